from pallas_kernels import _dispatch


def supported(inputs, options):
    return f"needs a Hopper GPU; this is {_dispatch.device_kind()}"
