"""The command line: train, generate, plan, rules, checkpoint, doctor. Each imports what it needs when it is called."""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import io
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: "try again", which is what a scheduler should do
EXIT_USER_ERROR = 2

HELP = """\
jaxscale: shard a model over any mesh, prove it, and run it at the speed of the hardware.

  jaxscale train RUN [--options]     train; the same command resumes after a stop
  jaxscale generate [--options]      generate text from a checkpoint or a published model
  jaxscale convert [--options]       write a model with its weights in 8 or 4 bits, for generate
  jaxscale plan [--options]          will it fit on that pod, with which mesh, how fast
  jaxscale bench links [--options]   measure matmuls, memory and links, for plan --hardware
  jaxscale rules FILE.py:BUILD       tensor-parallel rules of your own model, from its program
  jaxscale checkpoint ls|verify|diff|convert PATH ...
  jaxscale doctor                    what hardware and software is here, and what it unlocks

A RUN is a name ({runs}), file.py:function, a Python function that returns a
TrainConfig, or a model to go on from; every field is an option (jaxscale train tiny --help).

  jaxscale train tiny --simulate 8 --mesh.fsdp 4 --mesh.tp 2      eight devices on a laptop
  jaxscale train smollm2-135m --data.source my-notes/             fine-tune on text of your own
  jaxscale generate --model smollm2-135m --prompt "What is the capital of France?"

--simulate N (any command) splits the CPU into N simulated devices.
A mistake is answered in one line; JAXSCALE_TRACEBACK=1 shows where it was noticed.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a user's mistake, 75 when preempted (the run saved itself)."""
    args = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "train": _train,
        "generate": _generate,
        "convert": _convert,
        "plan": _plan,
        "bench": _bench,
        "rules": _rules,
        "checkpoint": _checkpoint,
        "doctor": _doctor,
    }
    try:
        args = _simulate(args)
        if not args or args[0] in ("-h", "--help", "help"):
            from jaxscale import runs

            print(HELP.format(runs=", ".join(_named_runs(runs))))
            return 0
        if args[0] not in commands:
            raise ValueError(f"no command {args[0]!r}{_nearest(args[0], commands)}; jaxscale --help lists them")
        return commands[args[0]](args[1:])
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        expected = (ValueError, OSError, NotImplementedError, ImportError, MemoryError)
        if not isinstance(error, expected):
            from jaxscale.train import NonFiniteLoss, Preempted  # brings JAX, which a mistyped option need not wait for

            if isinstance(error, Preempted):
                print(error, file=sys.stderr)
                return EXIT_PREEMPTED
            expected = NonFiniteLoss
        if os.environ.get("JAXSCALE_TRACEBACK") or not isinstance(error, expected):
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _train(args: list[str]) -> int:
    from jaxscale import runs
    from jaxscale.config import TrainConfig

    if not args or args[0].startswith("-"):
        names = "\n".join(
            f"  {name:<12} {(fn.__doc__ or '').splitlines()[0]}" for name, fn in _named_runs(runs).items()
        )
        print(
            f"jaxscale train RUN [--options]\n\nRuns:\n{names}\n\n"
            "Or file.py:function; or a model to go on from: smollm2-135m, a .gguf file, a Hugging Face directory, a\n"
            "run's directory. Options of a run: jaxscale train RUN --help"
        )
        return 0 if args and args[0] in ("-h", "--help") else EXIT_USER_ERROR
    with _own_code(args[0]):
        make = _find_run(args[0], runs)
        cfg = make()
    if not isinstance(cfg, TrainConfig):
        raise ValueError(f"{args[0]} returned {type(cfg).__name__}; a run is a function that returns a TrainConfig")
    cfg, options = _mesh(cfg, args[1:])
    cfg = _parse(TrainConfig, options, f"jaxscale train {args[0]}", default=cfg, description=make.__doc__)
    from jaxscale import distributed
    from jaxscale.run import run

    distributed.initialize()
    run(cfg)
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Generate text. A model that was trained to chat answers the prompt, any other continues it."""

    model: str = "smollm2-135m"
    """smollm2-135m, a .gguf file, a Hugging Face directory, or the directory of a training run"""
    prompt: tuple[str, ...] = ("What is the capital of France?",)
    """one or more prompts; they are generated in one batch"""
    quantize: str = ""
    """round the weights: w8a16, w4a16-g64, w8a8, w8a8-fp8, ...; or stored: keep those of a .gguf file packed"""
    cache: str = ""
    """of keys and values: int8, float8_e4m3fn or int4; empty: as they are computed"""
    mesh: str = ""
    """for example fsdp=2,tp=3; empty: the first device alone"""
    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 takes the likeliest token"""
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    raw: bool = False
    """continue the prompt as it stands: no chat template"""

    def __post_init__(self):  # before a model is read, which takes long
        if not self.model or not self.prompt:
            raise ValueError(f"model={self.model!r} and prompt={self.prompt}: name a model and at least one prompt")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        from jaxscale.config import check_sampling

        check_sampling(self.temperature, self.top_k, self.top_p)


def _generate(args: list[str]) -> int:
    options = _parse(GenerateOptions, args, "jaxscale generate")
    from jaxscale import distributed

    distributed.initialize()
    import jax
    from rich.console import Console

    from jaxscale.config import MeshConfig
    from jaxscale.generate import generate, stream_text
    from jaxscale.mesh import make_mesh
    from jaxscale.models.cache import CacheFormat
    from jaxscale.plan.room import memory_errors
    from jaxscale.quantize.recipe import to_nearest

    log = Console(stderr=True)
    if options.cache not in ("", *(known := get_args(CacheFormat))):
        raise ValueError(f"--cache {options.cache!r} is unknown; use one of {', '.join(known)}, or leave it out")
    if options.quantize not in ("", "stored"):
        to_nearest(options.quantize)
    sizes = MeshConfig.parse(options.mesh)
    if not options.mesh:
        mesh = make_mesh(devices=jax.devices()[:1])
    else:
        mesh = make_mesh(sizes, jax.devices()[: sizes.num_devices] if sizes.num_devices else None)
    remedy = "use --quantize w4a16-g64, --cache int8, or a mesh that splits the model, such as --mesh tp=2"
    with memory_errors(lambda: remedy):
        model = _load(options.model, mesh, options.quantize)
        for note in model.notes:
            log.print(note, style="yellow", highlight=False)
        prompts = [
            model.tokenizer.encode(text).tolist() if options.raw else model.encode_chat(text) for text in options.prompt
        ]
        single = len(prompts) == 1

        def write(row: int, text: str) -> None:
            if single:
                print(text, end="", flush=True)

        new = generate(
            model.params,
            model.cfg,
            prompts,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            stop_tokens=model.stop_tokens,
            key=jax.random.key(options.seed) if options.temperature else None,
            mesh=mesh,
            on_token=stream_text(model.tokenizer, write),
            cache_format=options.cache or model.cache_format,  # pyright: ignore[reportArgumentType]
        )
    if single:
        print()
    else:
        for prompt, ids in zip(options.prompt, new):
            print(f"> {prompt}\n{model.tokenizer.decode(ids)}\n")
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Write a model with its weights rounded, for jaxscale generate --model OUT."""

    quantize: str
    """w8a16, w4a16-g64, w8a8, w8a8-fp8, ...; a method with a calibration set, as in w4a16-g64-awq; or stored: the
    packed weights of a .gguf file"""
    out: str
    """a new directory"""
    model: str = "smollm2-135m"
    """smollm2-135m, a .gguf file, a Hugging Face directory, or the directory of a training run"""
    text: str = ""
    """a text file to calibrate awq, gptq, smoothquant and fmpq with"""
    calibration_tokens: int = 8192

    def __post_init__(self):
        if self.calibration_tokens < 1:
            raise ValueError(
                f"calibration_tokens={self.calibration_tokens} must be at least 1; some thousand are usual"
            )


def _convert(args: list[str]) -> int:
    options = _parse(ConvertOptions, args, "jaxscale convert")
    from jaxscale.models.decoder import param_specs
    from jaxscale.pretrained import require_new, save_model
    from jaxscale.quantize.apply import require_quantizable, summary
    from jaxscale.quantize.recipe import parse_recipe
    from jaxscale.run import load_outline

    recipe = options.quantize
    require_new(options.out)  # before the work
    if recipe != "stored" and parse_recipe(recipe).method != "rtn":
        if not Path(options.text).is_file():  # before the model is read
            raise ValueError(f"{recipe} needs a calibration set: --text FILE, a text file; {options.text!r} is none")
        require_quantizable(parse_recipe(recipe), param_specs(load_outline(options.model)[0]))
        model = _calibrated(_load(options.model, None), recipe, options)
    else:
        model = _load(options.model, None, recipe)
    save_model(model, options.out)
    print(f"wrote {options.out}: {summary(model.params)}")
    return 0


def _calibrated(model: Any, recipe: str, options: ConvertOptions) -> Any:
    import jax.numpy as jnp
    from rich.console import Console
    from rich.progress import track

    from jaxscale.models import decoder
    from jaxscale.quantize.calibrate import gather_statistics, quantize_calibrated
    from jaxscale.quantize.recipe import parse_recipe

    length = min(256, model.cfg.max_seq_len)
    ids = model.tokenizer.encode(Path(options.text).read_text("utf-8"))[: options.calibration_tokens]
    if len(ids) < length:
        raise ValueError(
            f"{len(ids)} tokens of {options.text} fill no row of {length}; use a longer --text, --calibration-tokens"
        )
    batches = [jnp.asarray(ids[None, i : i + length]) for i in range(0, len(ids) - length + 1, length)]
    specs = decoder.param_specs(model.cfg)
    run = lambda params, tokens: decoder.forward(params, tokens, model.cfg, remat="full")
    console = Console(stderr=True)
    shown = track(batches, f"rows of {length} tokens", console=console, disable=not console.is_terminal)
    statistics = gather_statistics(model.params, specs, run, shown)
    with console.status(f"rounding to {recipe}"):
        params = quantize_calibrated(model.params, recipe, specs, statistics)
    return dataclasses.replace(model, params=params, cache_format=parse_recipe(recipe).cache)


def _load(name: str, mesh: Any, quantize: str = "") -> Any:
    """A published model, a file or directory of one, or what a training run left behind."""
    import jax

    from jaxscale.chatml import END, chatml
    from jaxscale.data.chats import control_token
    from jaxscale.mesh import make_mesh
    from jaxscale.models.decoder import param_specs
    from jaxscale.pretrained import LoadedModel, load_model
    from jaxscale.quantize.apply import quantize as round_to_nearest
    from jaxscale.quantize.apply import require_quantizable
    from jaxscale.quantize.recipe import to_nearest
    from jaxscale.run import load_outline, load_run

    if (Path(name) / "checkpoints").is_dir():
        if quantize == "stored":
            raise ValueError(f"{name} is no .gguf file to keep packed; name a recipe, as in w8a16")
        recipe = to_nearest(quantize) if quantize else None
        if recipe is not None:  # before the model is read
            require_quantizable(recipe, param_specs(load_outline(name)[0]), mesh)
        first = jax.devices()[0]
        run = load_run(name, mesh or make_mesh(devices=[first]))
        # On a device alone: put on `first` itself, arrays would keep the mesh in their types.
        params = run.params if mesh else jax.device_put(run.params, jax.sharding.SingleDeviceSharding(first))
        chats = bool(run.train.data.messages_key)  # it learnt to answer
        stop = (control_token(run.tokenizer, END),) if chats else ()
        chat = chatml if chats else None
        model = LoadedModel(cfg=run.cfg, params=params, tokenizer=run.tokenizer, stop_tokens=stop, chat=chat)
        if recipe is not None:
            small = round_to_nearest(params, recipe, param_specs(run.cfg))
            model = dataclasses.replace(model, params=small, cache_format=recipe.cache)
        return model
    return load_model(name, mesh=mesh, quantize=quantize or None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RulesOptions:
    """Write tensor-parallel rules for any model. BUILD() returns (loss_fn, params, batch); shapes are enough
    (jax.ShapeDtypeStruct). Nothing is computed."""

    mesh: str = "fsdp=8,tp=8"
    hardware: str = "h200"
    """h200, h100, a100, v5e, v5p, v6e, tpu7x, cpu, or a TOML file"""
    memory_gb: float | None = None
    """for parameters, gradients and optimizer state of a device; default: all that the hardware has"""
    out: str = "rules.toml"


def _rules(args: list[str]) -> int:
    if not args or args[0].startswith("-"):
        _parse(RulesOptions, args, "jaxscale rules FILE.py:BUILD")  # --help ends here
        raise ValueError("jaxscale rules needs file.py:function, a function that returns (loss_fn, params, batch)")
    options = _parse(RulesOptions, args[1:], f"jaxscale rules {args[0]}")
    import sharding_rules
    from jaxscale.config import MeshConfig

    with _own_code(args[0]):
        built = _function(args[0])()
    if not (isinstance(built, tuple) and len(built) == 3 and callable(built[0])):
        raise ValueError(f"{args[0]} returned {type(built).__name__}; it should return (loss_fn, params, batch)")
    config = MeshConfig.parse(options.mesh)
    if config.num_devices is None:
        raise ValueError(f"mesh {options.mesh}: rules are for a mesh of known size; replace the -1")
    if config.num_devices == 1:
        raise ValueError(f"mesh {options.mesh!r} is one device: nothing to split; name axes, as in --mesh fsdp=8,tp=8")
    sizes = {axis: size for axis, size in dataclasses.asdict(config).items() if isinstance(size, int) and size > 1}
    memory = None if options.memory_gb is None else options.memory_gb * 1e9
    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"--memory-gb {options.memory_gb} must be a positive, finite number, as in --memory-gb 80")
    with _own_code(args[0]):
        inferred = sharding_rules.infer(*built)
    plan = sharding_rules.search(inferred, sizes, options.hardware, memory=memory)
    print(plan.explain())
    plan.save(options.out)
    print(f"written to {options.out}: edit it, and read it back with sharding_rules.Plan.load")
    return 0


def _plan(args: list[str]) -> int:
    from jaxscale.plan.command import PlanOptions, plan_command

    return plan_command(_parse(PlanOptions, args, "jaxscale plan"))


def _bench(args: list[str]) -> int:
    if args[:1] != ["links"]:
        raise ValueError("jaxscale bench links is what there is; jaxscale bench links --help")
    from jaxscale.plan.links import LinksOptions, links_command

    return links_command(_parse(LinksOptions, args[1:], "jaxscale bench links"))


def _checkpoint(args: list[str]) -> int:
    from jaxscale.checkpoint.command import checkpoint_command

    return checkpoint_command(args, _function)


def _doctor(args: list[str]) -> int:
    if args:
        raise ValueError(f"jaxscale doctor takes no options, got {' '.join(args)}")
    from rich.console import Console
    from rich.table import Column, Table

    from jaxscale.doctor import examine

    fold = [Column(name, overflow="fold") for name in ("what", "found", "what it unlocks")]  # no name of a flag is cut
    table = Table("", *fold, box=None)
    marks = {"ok": "[green]✓[/]", "missing": "[red]✗[/]", "note": "[yellow]·[/]"}
    for line in examine():
        table.add_row(marks[line.state], line.topic, line.found, line.unlocks.replace("[", "\\["))
    Console().print(table)
    return 0


def _parse(cls: type, args: list[str], prog: str, **kwargs: Any) -> Any:
    """Options -> a configuration; every field of it is an option."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            cfg, unknown = tyro.cli(
                tyro.conf.AvoidSubcommands[cls],  # type: ignore
                args=args,
                prog=prog,
                return_unknown_args=True,
                **kwargs,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{_words(said.getvalue())}; {prog} --help lists the options") from None
    if unknown:
        why = _absent(unknown[0], kwargs.get("default")) or _nearest(unknown[0], _options(cls))
        raise ValueError(f"no option {unknown[0]!r}{why}; {prog} --help lists them")
    return cfg


def _absent(option: str, cfg: Any) -> str:
    """Why a field of a part that this configuration does not have, such as its experts, is no option."""
    names = option.lstrip("-").replace("-", "_").split(".")
    for i, name in enumerate(names[:-1], 1):
        cfg = getattr(cfg, name, ...)
        if cfg is None:
            part = ".".join(names[:i])
            return f": {part} is None in this run; name one that has it, as file.py:function (tiny_moe has model.moe)"
    return ""


def _words(framed: str) -> str:
    """What the option parser says, out of its frame (of lines or, where the terminal has none, of dashes)."""
    text = " ".join(re.sub("[╭╰╮╯│─]|-{3,}", " ", framed.partition("For full helptext")[0]).split())
    # What it could not read, an option or a part of the configuration, belongs to the message; the title of its frame,
    # the class of the whole configuration and a second copy of the help do not.
    text = re.sub(r"^(Value error Error parsing (?:[A-Z]\w+: )?|Invalid choice |Missing argument )", "", text)
    return text.partition(" Argument helptext:")[0].rstrip(".")


def _options(cls: type, prefix: str = "--") -> list[str]:
    out = []
    for field in dataclasses.fields(cls):
        name = prefix + field.name.replace("_", "-")
        out += _options(field.type, name + ".") if dataclasses.is_dataclass(field.type) else [name]  # type: ignore
    return out


def _find_run(name: str, runs: Any) -> Callable[[], Any]:
    named = _named_runs(runs)
    if name in named:
        return named[name]
    if ":" in name:
        return _function(name)
    from jaxscale.pretrained import NAMED, QUANTIZED  # brings JAX

    path = Path(name)
    # What was quantized is no model to go on from; who reads it says so.
    held = any((path / file).is_file() for file in ("config.json", QUANTIZED))
    if not (name in NAMED or path.suffix == ".gguf" or held):
        raise ValueError(
            f"no run {name!r}{_nearest(name, [*named, *NAMED])}; the runs are {', '.join(named)}, file.py:function, "
            f"or a model to go on from: {', '.join(NAMED)}, a .gguf file, a Hugging Face directory, a run's directory"
        )

    @functools.wraps(runs.go_on)
    def go_on():
        return runs.go_on(name)

    return go_on


def _function(name: str) -> Callable[..., Any]:
    """The function that file.py:function names."""
    path, _, function = name.partition(":")
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; name a function of your own as file.py:function")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file; name a function of your own as file.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).resolve().parent))  # its neighbours import as they do when it is run
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    if not callable(getattr(module, function, None)):
        own = [n for n, f in vars(module).items() if inspect.isfunction(f)]
        raise ValueError(
            f"{path} has no function {function!r}{_nearest(function, own)}; it has {', '.join(own) or 'none'}"
        )
    return getattr(module, function)


@contextlib.contextmanager
def _own_code(name: str) -> Iterator[None]:
    """What goes wrong in the file that file.py:function names, in one line that says where in it."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError, ImportError):  # as everywhere: these speak for themselves
        raise
    except Exception as error:
        path = str(Path(name.partition(":")[0]).resolve())
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if str(Path(f.filename).resolve()) == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f", line {line}" if line else ""
        said = " ".join(str(error).split())
        raise ValueError(
            f"{name}{where}: {type(error).__name__}: {said}; JAXSCALE_TRACEBACK=1 shows the whole trace"
        ) from error


def _named_runs(runs: Any) -> dict[str, Callable[[], Any]]:
    own = lambda f: inspect.isfunction(f) and f.__module__ == runs.__name__
    return {n: f for n, f in vars(runs).items() if own(f) and not inspect.signature(f).parameters}


def _simulate(args: list[str]) -> list[str]:
    """Take `--simulate N` out of the arguments; it must act before JAX looks at its devices."""
    args = _apart(args, "--simulate")
    if "--simulate" not in args:
        return args
    if args.count("--simulate") > 1:
        raise ValueError("--simulate is given twice; give it once, as in --simulate 8")
    at = args.index("--simulate")
    count = args[at + 1] if at + 1 < len(args) else ""
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f"--simulate {count}: expected a number of devices, as in --simulate 8")
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
    )
    os.environ["JAX_PLATFORMS"] = "cpu"
    return args[:at] + args[at + 2 :]


def _mesh(cfg: Any, args: list[str]) -> tuple[Any, list[str]]:
    """Take `--mesh fsdp=2,tp=4`, as other commands write it, out of the arguments and into the configuration."""
    from jaxscale.config import MeshConfig

    args = _apart(args, "--mesh")
    if "--mesh" not in args:
        return cfg, args
    at = args.index("--mesh")
    sizes = args[at + 1] if at + 1 < len(args) else ""
    if not sizes or sizes.startswith("-"):
        raise ValueError("--mesh: expected axes and their sizes, as in --mesh fsdp=2,tp=4")
    return dataclasses.replace(cfg, mesh=MeshConfig.parse(sizes)), args[:at] + args[at + 2 :]


def _apart(args: list[str], option: str) -> list[str]:
    """`option=value` as the two arguments that it stands for."""
    return [part for arg in args for part in (arg.split("=", 1) if arg.startswith(f"{option}=") else [arg])]


def _nearest(name: str, names: Any) -> str:
    import difflib

    bare = {n.lstrip("-"): n for n in names}  # dashes that all options share make none of them alike
    close = difflib.get_close_matches(name.lstrip("-"), list(bare), n=1)
    return f" (did you mean {bare[close[0]]!r}?)" if close else ""


if __name__ == "__main__":
    sys.exit(main())
