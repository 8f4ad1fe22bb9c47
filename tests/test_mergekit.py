"""Our merges and mergekit's, from the same recipes, both against float64; needs ``pip install '.[mergekit]'``.

mergekit runs in this process, set to float32. What is compared is said in ``mergekit_cases``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metagpt_fast

from .checkpoints import read_state
from .mergekit_cases import CASES, NAMES, NUM_LAYERS, RANDOM_CASES, SLICES, Case, Slices
from .method_oracles import BoolArray, FloatArray, Merged

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what others deprecate in it
    pytest.importorskip("mergekit", reason="pip install '.[mergekit]' compares with mergekit")
    import transformers
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

pytestmark = pytest.mark.slow

LEAST_CORRECT = 0.999
# Of the largest term: four roundings of float32 in a sum whose terms cancel.
SMALLEST = 2.0**-21
NOISE = 1e-14  # errors of the oracle, of the largest term
PRECISION = {"bfloat16": (8, -133), "float16": (11, -24), "float32": (24, -149)}
SIGMAS = (2e-3, 1e-3, 1.5e-3)

State = dict[str, FloatArray]
Run = Callable[[Case | Slices], State]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base and three fine-tunes of a small Llama, bf16, as transformers saves them."""
    folder: Path = tmp_path_factory.mktemp("family")
    sizes = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 384, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False
    )
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config)
    # Norms begin as 1, where bfloat16 is too coarse for small changes: spread them, and change them more.
    start = {
        key: value.detach() * (1.0 if value.ndim > 1 else 1 + 0.3 * torch.randn_like(value))
        for key, value in model.named_parameters()
    }
    scale = {key: 1.0 if value.ndim > 1 else 10.0 for key, value in start.items()}
    shared = {key: torch.randn_like(value) * 5e-4 for key, value in start.items()}
    model = model.to(torch.bfloat16)
    for name, sigma in zip(NAMES, (0.0, *SIGMAS), strict=True):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                change = torch.randn_like(start[key]) * sigma + shared[key] if sigma else 0.0
                parameter.copy_(start[key] + scale[key] * change)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def arrays(family: Path) -> dict[str, State]:
    return {name: load(family / name) for name in NAMES}


@pytest.fixture(scope="module")
def by_mergekit(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return what runs a case with mergekit, once."""
    known: dict[str, State] = {}

    def run(case: Case | Slices) -> State:
        if case.name not in known:
            out = tmp_path_factory.mktemp("theirs")
            options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, lazy_unpickle=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run_merge(MergeConfiguration.model_validate(case.recipe(family)), str(out), options)
            known[case.name] = load(out)
        return known[case.name]

    return run


@pytest.fixture
def by_us(family: Path, tmp_path: Path) -> Callable[[dict[str, Any]], State]:
    """Return what runs a recipe with this package."""
    if not hasattr(metagpt_fast, "run"):
        pytest.skip("recipes cannot be run yet")
    count = iter(range(100))

    def run(recipe: dict[str, Any]) -> State:
        number = next(count)
        path = tmp_path / f"recipe{number}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        metagpt_fast.run(path, tmp_path / f"out{number}")
        return load(tmp_path / f"out{number}")

    return run


def load(folder: Path) -> State:
    return {name: tensor.values.reshape(tensor.shape) for name, tensor in read_state(folder).items()}


def unit(values: FloatArray, dtype: str) -> FloatArray:
    """Return the distance of neighbours in ``dtype`` where the values are."""
    digits, least = PRECISION[dtype]
    _, exponents = np.frexp(values)
    return np.ldexp(1.0, np.where(values == 0, least, np.maximum(exponents - digits, least)))


class Comparison:
    """Adds up, over the tensors of a merge, how near it is to the oracle."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self.num_compared = self.num_correct = self.num_left_out = 0
        self.worst = 0.0  # largest error as a multiple of what is allowed

    def add(self, name: str, result: FloatArray, oracle: Merged, left_out: BoolArray) -> None:
        assert result.shape == oracle.result.shape, name
        # What float64 leaves of terms that cancel is 0.
        exact = np.where(np.abs(oracle.result) < NOISE * oracle.largest, 0.0, oracle.result)
        unit_here = unit(exact, self._dtype)
        error = np.abs(result - exact)
        allowed = np.maximum(unit_here, SMALLEST * oracle.largest)
        certain = ~left_out
        self.num_compared += int(certain.sum())
        self.num_left_out += int(left_out.sum())
        # Weights like 0.3 of values on a grid often give the middle of two numbers. There either is correct: which one
        # float64 is nearer to is its own rounding error.
        self.num_correct += int((error <= unit_here / 2 + NOISE * oracle.largest)[certain].sum())
        self.worst = max(self.worst, float((error / allowed)[certain].max(initial=0.0)))

    @property
    def correct(self) -> float:
        return self.num_correct / self.num_compared

    def __str__(self) -> str:
        left_out = self.num_left_out / (self.num_compared + self.num_left_out)
        return (
            f"{self.correct:.4%} correctly rounded, worst {self.worst:.3f} of what is allowed, {left_out:.2%} left out"
        )


def names_of(case: Case | Slices) -> Any:
    return case.name.replace(" ", "-")


@pytest.mark.parametrize("case", [case for case in (*CASES, *SLICES) if case.is_peer_near], ids=names_of)
def test_mergekit_is_near_the_oracle(case, arrays, by_mergekit, record_property):
    """The recipe means to mergekit what the case says: parameters, gradients, filters, slices."""
    compared = Comparison(case.out_dtype)
    for name, result in by_mergekit(case).items():
        oracle = case.expected(name, arrays)
        compared.add(name, result, oracle, oracle.doubtful | oracle.tied)
    record_property("mergekit", str(compared))
    print(f"\n{case.name}: mergekit: {compared}")
    assert compared.num_compared > 100_000
    assert compared.worst <= 4.0
    assert compared.correct > 0.99


@pytest.mark.parametrize("case", [*CASES, *SLICES], ids=names_of)
def test_we_are_nearer(case, family, arrays, by_mergekit, by_us, record_property):
    """Correctly rounded in 99.9 % of elements, nowhere further than a unit, nowhere further than mergekit."""
    ours, theirs = by_us(case.recipe(family)), by_mergekit(case)
    assert ours.keys() == theirs.keys()
    mine, peers = Comparison(case.out_dtype), Comparison(case.out_dtype)
    for name, result in ours.items():
        oracle = case.expected(name, arrays)
        mine.add(name, result, oracle, oracle.doubtful)
        peers.add(name, theirs[name], oracle, oracle.doubtful | oracle.tied)
        if case.name == "arcee_fusion":  # mergekit's is not rounded
            continue
        # Where both are half a unit off, the one that rounds the other way is nearer by an error of float32.
        beyond = np.abs(result - oracle.result) - np.abs(theirs[name] - oracle.result)
        assert (beyond <= SMALLEST * oracle.largest)[~oracle.doubtful].all(), name
    record_property("ours", str(mine))
    record_property("mergekit", str(peers))
    print(f"\n{case.name}: ours: {mine}; mergekit: {peers}")
    assert mine.num_left_out < 0.05 * mine.num_compared
    assert mine.worst <= 1.0
    assert mine.correct >= LEAST_CORRECT


@pytest.mark.parametrize("case", RANDOM_CASES, ids=names_of)
def test_random_masks_are_applied_as_the_formula_says(case, family, arrays, by_us):
    """The masks are read off merges in which one model alone has a weight; then all is as with given masks."""
    masks = random_masks(case, family, arrays, by_us)
    ours = by_us(case.recipe(family))
    compared = Comparison(case.out_dtype)
    for name, result in ours.items():
        oracle = case.expected(name, arrays, masks=[masks[model][name] for model in case.models])
        compared.add(name, result, oracle, oracle.doubtful)
    print(f"\n{case.name}: {compared}")
    assert compared.worst <= 1.0
    assert compared.correct >= LEAST_CORRECT


@pytest.mark.parametrize("case", RANDOM_CASES, ids=names_of)
def test_random_masks_keep_what_density_says_as_mergekits_do(case, family, arrays, by_us, by_mergekit):
    density = float(case.shared["density"])
    masks = random_masks(case, family, arrays, by_us)
    for model in case.models:
        changed = np.concatenate(
            [masks[model][name][arrays[model][name] != arrays["base"][name]] for name in arrays["base"]]
        )
        # Five standard deviations. Elements that do not differ from the base are small ones, which DELLA drops more
        # often; they cannot be seen, which lifts its mean.
        bound = 5 * np.sqrt(density * (1 - density) / changed.size) + (0.02 if "della" in case.method else 0)
        assert abs(changed.mean() - density) < bound
    # Different models, different masks.
    first, second = (
        np.concatenate([masks[model][name].reshape(-1) for name in arrays["base"]]) for model in case.models[:2]
    )
    assert np.mean(first == second) < 0.6


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_the_expectation_over_seeds_is_the_task_vector(method, family, arrays, by_us):
    num_seeds, density = 24, 0.5
    name = "model.layers.0.mlp.up_proj.weight"
    total = np.zeros_like(arrays["base"][name])
    for seed in range(num_seeds):
        case = Case(method, ("chat",), {"density": density, "weight": 1.0, "seed": seed}, out_dtype="float32")
        total += by_us(case.recipe(family))[name] - arrays["base"][name]
    delta = arrays["chat"][name] - arrays["base"][name]
    # Least squares: the mean over the seeds is the task vector times about 1. DELLA keeps the larger half of a row with
    # up to density + epsilon, so its large elements come out larger by at most epsilon / density.
    slope = float((total / num_seeds * delta).sum() / (delta**2).sum())
    error = np.sqrt((1 - density) / density * (delta**4).sum()) / (delta**2).sum() / np.sqrt(num_seeds)
    assert abs(slope - 1) < 5 * error + (0.3 if "della" in method else 0.0)


def random_masks(case: Case, family: Path, arrays: dict[str, State], by_us: Any) -> dict[str, dict[str, BoolArray]]:
    """Return which elements of each model are kept: those that change if all other models have weight 0."""
    found = {}
    for model in case.models:
        weight = [1.0 if other == model else 0.0 for other in case.models]
        alone = Case(case.method, case.models, case.shared, {"weight": weight}, out_dtype="float32")
        out = by_us(alone.recipe(family))
        found[model] = {name: values != arrays["base"][name] for name, values in out.items()}
    return found
