"""Settings of `refine`. The defaults are what the benchmarks show to be best; most users need none of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from cptv_ao.core.blocks import BlockPolicy
from cptv_ao.core.contexts import check_device
from cptv_ao.core.losses import LOSSES, Loss
from cptv_ao.core.tensors import Select, first_floating
from cptv_ao.core.value_kinds import is_code_range, is_device, is_integer, is_number

LossName = Literal["auto", "kl", "infonce", "soft_infonce", "mse", "cosine"]
# As in <function loss at 0x7f3a5c0>.
_ADDRESS = re.compile(r"(?: at)? 0x[0-9a-fA-F]+")

SearchName = Literal["evolution", "paper", "cma"]
Individual = Literal["output_error", "ranges", "curvature", "biases"]


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """How `refine` searches. Frozen and validated; `RefineConfig()` is the recommended setting.

    Attributes:
        loss: `auto`: `kl` for logits, which come out of a layer with a weight; `cosine` for embeddings, which do not;
            `mse` for maps, sequences and one number per image; of a model with several outputs the mean of what suits
            each, as a share of what the best output loses that is the same for all images. Another name; or a function
            `(candidate (N, C), teacher (N, C)) -> scalar`, float32 tensors, that is never negative; both of each
            output. Or such by the names of outputs, `{"logits": "kl", "aux": None}`: None leaves one out, what is not
            named is `auto`. One that cannot be differentiated is followed by the block visits; the gradient steps
            follow the layer inputs alone.
        temperature: of the InfoNCE losses (3.0 as published); ignored by the others.
        search: strategy of the block visits: `evolution` (default), `paper` (arXiv 2211.09643), `cma` (extra `cma`).
        population: individuals tried beside the observers' scales: `output_error`, per-channel weight scales that
            least change each layer's output, then codes that do (GPTQ, arXiv 2210.17323), and weights that give back
            what was taken before them (GPTAQ, arXiv 2504.02692, not of 8 bits; both not with `rounding_rate=0`);
            `ranges`, the activations' whole container and half of it, and where kernels saturate on the whole one
            that with weights of fewer codes; `curvature`, activation ranges that least change the loss, to second
            order, by the gradients of random directions of the outputs in float; `biases`, which give each layer's
            output the mean that it has in float (arXiv 1906.04721), and which the gradient steps then learn with the
            scales. Not of reference models.
        equalize: search an equivalent form of the model, where there is one that scales can make more of: unfused batch
            norms become scales and biases of the layers before them, ranges are cut to what a ReLU or ReLU6 lets
            through, residual streams of which a few channels are far larger than the others are rotated (behind a norm
            that is returned a linear layer in float, which is new, rotates back), channels get like ranges across
            layers, and so do those behind a layer norm that only linear layers read (all three where their float
            weights are known); these move to the middle of their ranges, by biases, as do keys of attention. In PT2E
            graphs only what linear layers read is changed, behind norms and attention. Only where `include` and
            `kinds` leave nothing out; never of reference models.
        gradient_steps: Adam steps on the float twin that propose scales before the block visits; 0 for none. A step is
            of about 100 images, of fewer (2 at least) where a forward of one is more than .25 GFLOP, of 50 on a GPU;
            where it is of fewer, there are more, which go as far, if 30 TFLOP of forwards pay for them.
            Proposals enter only where the model's own kernels confirm them.
        learning_rate: of those steps, on the logarithm of the scales; weights of 7 bits or more move slower, and
            all do where steps are of fewer images: by the square root of the share.
        activation_rate: multiple of the learning rate at which activation scales and zero_points move.
        rounding_rate: multiple of the learning rate at which each weight decides whether it is rounded up or down
            (AdaRound, arXiv 2004.10568); 0: all are rounded to the nearest code.
        feature_weight: what the gradient steps follow beside the loss: noise to signal of the layer inputs, the squared
            error against those of the float network over their square, mean over the weighted layers. It counts so
            many times the loss, both as they are at the start; 0: the loss alone.
        passes: sweeps over all blocks; they end early once the visits have gained nothing in 200 TFLOP of forwards, or,
            without limits, cost 50 in all; behind gradient steps none begins where one costs so much, nor on a GPU.
        evaluations: candidates per block visit.
        include: fnmatch patterns of site names that are searched (`"blocks.*"`, `"*.weight"`).
        kinds: which scales are searched: weights, activations (with their zero_points), or both.
        blocks: replaces the policy that puts sites into blocks; see `cptv_ao.blocks_by_path`.
        block_order: `forward`, or `backward` as published.
        weight_range: nominal `(qmin, qmax)` of all weight codes, e.g. `(-4, 3)`; by default from the qconfigs of
            `float_model`, else inferred from the codes. A PT2E graph has its own, and no others.
        holdout: fraction of the batches that only accept or reject the result; 0 accepts on the search images.
        output: what the loss compares: the name of an output, several, or a function that picks from what the model
            returns, a tensor or any nesting of them; by default every floating tensor that has rows for the images.
        score_on: `kernels`: the model's own quantized kernels (CPU). `simulation`: the float twin, on `device`; what
            the search finds is then accepted or rejected as a whole on the kernels.
        accept_on: makes of a copy of the model what will ship, e.g. `torch.compile` (for which torchao's fusions are
            imported); a search on the simulation (that of a PT2E graph always is one) is accepted or rejected on what
            it returns. Its calls count in `max_seconds`; where that pays for none after a search, there is none.
        device: where the float network runs, and the simulation that proposes scales, e.g. `cuda`; the model's own
            kernels judge on the CPU (with `score_on="simulation"` once, at the end).
        racing: drop a child once it is clearly behind its parent on the images seen so far. A few children that would
            have caught up are lost, most forwards of the others are saved; what is accepted was scored on all images.
        cache_bytes: what cached block entries may hold; batches beyond it run the whole model per candidate. Before,
            in the gradient steps, a quarter of it for layer inputs of the float network, else computed each time.
        distributed: None: where a `torch.distributed` process group is initialised, all its ranks search together and
            each must call `refine`; True: raise where there is none; False: this process searches on its own.
        seed: of the search; no global generator is read or changed.
        max_evaluations: stop after this many candidates; None for no limit.
        max_seconds: stop after this many seconds of the whole call; None for no limit. A search that has few scores as
            many of the images as they pay for, and learns from all.
        epsilon: half-width of the uniform noise of the `paper` search.
    """

    loss: LossName | Loss | Mapping[str, LossName | Loss | None] = "auto"
    temperature: float = 3.0
    search: SearchName = "evolution"
    population: tuple[Individual, ...] = ("output_error", "ranges", "curvature", "biases")
    equalize: bool = True
    gradient_steps: int = 600
    learning_rate: float = 0.03
    activation_rate: float = 3.0
    rounding_rate: float = 0.1
    feature_weight: float = 3.0
    passes: int = 2
    evaluations: int = 20
    include: tuple[str, ...] = ("*",)
    kinds: tuple[Literal["weight", "activation"], ...] = ("weight", "activation")
    blocks: BlockPolicy | None = None
    block_order: Literal["forward", "backward"] = "forward"
    weight_range: tuple[int, int] | None = None
    holdout: float = 0.2
    output: Callable[[Any], Any] | str | tuple[str, ...] | None = None
    score_on: Literal["kernels", "simulation"] = "kernels"
    accept_on: Callable[[Any], Any] | None = None
    device: str = "cpu"
    racing: bool = True
    cache_bytes: int = 2**31
    distributed: bool | None = None
    seed: int = 0
    max_evaluations: int | None = None
    max_seconds: float | None = None
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_numbers(self)
        _check_tuples(self)

    @classmethod
    def paper(cls, weight_bits: int = 8, **changes: Any) -> RefineConfig:
        """The published method (arXiv 2211.09643, section 4): 10 passes of 3 children per block, InfoNCE at T = 3.

        Per-channel weight scales of the attention layers, attention blocks visited last to first, absolute
        uniform noise of +-1e-3 (3- and 4-bit weights) or +-1e-4 (8-bit). Batches of 100 images are expected.
        """
        settings: dict[str, Any] = {
            "search": "paper",
            "loss": "infonce",
            "temperature": 3.0,
            "population": (),
            "equalize": False,
            "gradient_steps": 0,
            "passes": 10,
            "evaluations": 3,
            "include": ("*attn*",),
            "kinds": ("weight",),
            "block_order": "backward",
            "epsilon": 1e-3 if weight_bits <= 4 else 1e-4,
        }
        return cls(**(settings | changes))

    @property
    def searches_all(self) -> bool:
        """Whether the scales of weights and of activations may move, all of them."""
        return self.include == ("*",) and len(set(self.kinds)) > 1

    @property
    def pick(self) -> Callable[[Any], Any] | None:
        """The user's function that picks from what the model returns."""
        return None if isinstance(self.output, (str, tuple)) else self.output

    @property
    def select(self) -> Select:
        """What picks the tensor that is compared."""
        return self.pick or first_floating

    @property
    def loss_name(self) -> str:
        """What a report calls the loss."""
        name = self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", None)
        return name if isinstance(name, str) else "loss"

    def told(self) -> dict[str, str]:
        """Each setting in words, by name; functions by their name, nothing by its address."""
        return {field.name: _told(getattr(self, field.name)) for field in fields(self)}


def given_config(config: RefineConfig | None) -> RefineConfig:
    """What was given, or the default one.

    Raises:
        TypeError: it is no config.
        ValueError: there is no such device.
    """
    config = RefineConfig() if config is None else config
    if not isinstance(config, RefineConfig):
        raise TypeError(f"config: expected a RefineConfig, got {type(config).__name__}")
    check_device(config.device)
    return config


def name_of(function: Callable[..., Any]) -> str:
    """What a function or a callable object is called; an object like its type."""
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_told(one)}" for key, one in value.items()) + "}"
    if not callable(value):
        return repr(value)
    if isinstance(getattr(value, "__qualname__", None), str):
        return name_of(value)
    try:
        return _ADDRESS.sub("", repr(value))
    except Exception:  # of the user's own code, which has no say here
        return name_of(value)


def _check_choices(config: RefineConfig) -> None:
    names = ["auto", *sorted(LOSSES)]
    by_name = config.loss if isinstance(config.loss, Mapping) else {"": config.loss}
    for one in by_name.values():
        left_out = one is None and isinstance(config.loss, Mapping)
        _expect(left_out or callable(one) or one in names, "loss", f"one of {names} or a function", one)
    _expect(config.search in ("evolution", "paper", "cma"), "search", "'evolution', 'paper' or 'cma'", config.search)
    _expect(config.score_on in ("kernels", "simulation"), "score_on", "'kernels' or 'simulation'", config.score_on)
    _expect(is_device(config.device), "device", "a device such as 'cpu' or 'cuda:1'", config.device)
    _expect(config.block_order in ("forward", "backward"), "block_order", "'forward' or 'backward'", config.block_order)
    named = (config.output,) if isinstance(config.output, str) else config.output
    if isinstance(named, tuple):
        all_names = bool(named) and all(isinstance(name, str) for name in named)
        _expect(all_names, "output", "names of outputs, a function or None", config.output)
    else:
        _expect(named is None or callable(named), "output", "names of outputs, a function or None", named)
    for name in ("blocks", "accept_on"):
        value = getattr(config, name)
        _expect(value is None or callable(value), name, "a function or None", value)
    for name in ("racing", "equalize"):
        value = getattr(config, name)
        _expect(isinstance(value, bool), name, "True or False", value)
    alone = config.distributed is None or isinstance(config.distributed, bool)
    _expect(alone, "distributed", "True, False or None", config.distributed)


def _check_numbers(config: RefineConfig) -> None:
    for name in ("temperature", "learning_rate", "activation_rate", "epsilon"):
        value = getattr(config, name)
        _expect(is_number(value) and 0 < value < math.inf, name, "a finite number > 0", value)
    for name in ("rounding_rate", "feature_weight"):
        value = getattr(config, name)
        _expect(is_number(value) and 0 <= value < math.inf, name, "a finite number >= 0", value)
    for name, least in (("passes", 0), ("evaluations", 1), ("gradient_steps", 0), ("seed", 0), ("cache_bytes", 0)):
        value = getattr(config, name)
        _expect(is_integer(value) and value >= least, name, f"an integer >= {least}", value)
    _expect(is_number(config.holdout) and 0 <= config.holdout < 1, "holdout", "a fraction in [0, 1)", config.holdout)
    _expect(
        config.max_evaluations is None or (is_integer(config.max_evaluations) and config.max_evaluations >= 0),
        "max_evaluations",
        "an integer >= 0 or None",
        config.max_evaluations,
    )
    _expect(
        config.max_seconds is None or (is_number(config.max_seconds) and config.max_seconds > 0),
        "max_seconds",
        "a number > 0 or None",
        config.max_seconds,
    )


def _check_tuples(config: RefineConfig) -> None:
    _expect(
        isinstance(config.include, tuple) and all(isinstance(p, str) for p in config.include),
        "include",
        "a tuple of patterns",
        config.include,
    )
    _expect(
        isinstance(config.population, tuple) and set(config.population) <= set(get_args(Individual)),
        "population",
        "a tuple of 'output_error', 'ranges', 'curvature' and 'biases'",
        config.population,
    )
    _expect(
        isinstance(config.kinds, tuple) and bool(config.kinds) and set(config.kinds) <= {"weight", "activation"},
        "kinds",
        "a non-empty tuple of 'weight' and 'activation'",
        config.kinds,
    )
    codes = config.weight_range
    _expect(codes is None or is_code_range(codes), "weight_range", "(qmin, qmax) within -128..127", codes)


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"RefineConfig.{name}: expected {expected}, got {got!r}")
