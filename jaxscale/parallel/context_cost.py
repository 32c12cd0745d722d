from typing import Literal

Layout = Literal["contiguous", "zigzag", "striped", "packed"]
Strategy = Literal["all_gather", "ring", "bidirectional", "ulysses", "usp", "halo"]
