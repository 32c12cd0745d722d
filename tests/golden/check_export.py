"""transformers loads what jaxscale exported and computes the original's logits, bit for bit, for every family.

.venv/bin/python tests/golden/check_export.py write DIRECTORY     # imports each family and exports it, in several files
GOLDEN/bin/python tests/golden/check_export.py read DIRECTORY     # with torch and transformers, as make_golden.py needs
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
FAMILIES = sorted(str(p.parent.relative_to(HERE)) for p in HERE.rglob("io.safetensors"))


def write(directory: Path) -> None:
    from jaxscale.checkpoint.huggingface import export_hf, import_hf

    for family in FAMILIES:
        params, cfg = import_hf(HERE / family)
        export_hf(params, cfg, directory / family, max_file_bytes=60_000)
        print(f"{family:20} {len(list((directory / family).glob('*.safetensors')))} files")


def read(directory: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)

    def logits_of(path: Path) -> torch.Tensor:
        model, said = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        wrong = {what: names for what, names in said.items() if names}
        assert not wrong, f"{path}: {wrong}"
        with torch.no_grad():
            return model.eval()(input_ids=io["tokens"].long(), use_cache=False).logits

    for family in FAMILIES:
        io = load_file(HERE / family / "io.safetensors")
        exported = logits_of(directory / family)
        distances = [(exported - other).abs().max().item() for other in (logits_of(HERE / family), io["logits"])]
        print(
            f"{family:20} logits differ by {distances[0]:.3g} from the original's, {distances[1]:.3g} from the golden"
        )
        assert distances[0] == 0 and distances[1] < 1e-4, family


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
