"""What stands between the matmuls of a layer that decodes few tokens; see api.py."""
