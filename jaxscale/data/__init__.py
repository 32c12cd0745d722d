"""Text to batches: tokenizers, a hold-out split, packed rows, and a resumable stream of them for every process."""

from jaxscale.data.loader import Batches, Dataset, make_dataset
from jaxscale.data.packing import document_order, pack_rows
from jaxscale.data.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "Batches",
    "ByteTokenizer",
    "Dataset",
    "HFTokenizer",
    "Tokenizer",
    "document_order",
    "load_tokenizer",
    "make_dataset",
    "pack_rows",
    "train_bpe",
]
