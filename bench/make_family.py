"""Makes the checkpoints that bench_merge merges: a Llama-shaped base and three fine-tunes, bf16, several shards.

python bench/make_family.py FOLDER [--scale 4]
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
from benchlib.machine import free_nbytes

from metagpt_fast.family import BASE_NAME, NAMES, PRESETS, FamilyPreset, LlamaShape, family_nbytes, make_family

_SEED = 20240617

# Scale 4 has 4.0 times the parameters of 1 in fewer and larger tensors: memory must grow with neither.
FAMILIES: dict[int, FamilyPreset] = {
    1: PRESETS["1.1b"],
    4: FamilyPreset(LlamaShape(8192, 20480, 6, 64, 8, 32000), 4 << 30),
}


@dataclass(frozen=True)
class BenchFamily:
    """A family on disk."""

    base: Path
    models: tuple[Path, ...]
    num_parameters: int

    @property
    def weights(self) -> list[Path]:
        """Return every safetensors file, base first."""
        return [path for folder in (self.base, *self.models) for path in sorted(folder.glob("*.safetensors"))]

    @property
    def input_nbytes(self) -> int:
        """Return the bytes of base and models."""
        return sum(path.stat().st_size for path in self.weights)

    @property
    def model_nbytes(self) -> int:
        """Return the bytes of one model."""
        return sum(path.stat().st_size for path in self.base.glob("*.safetensors"))


def default_folder(scale: int) -> Path:
    """Return where families are kept between runs."""
    return Path(tempfile.gettempdir()) / "metagpt-fast-bench" / f"llama-scale{scale}"


def get_family(folder: Path, *, scale: int = 1, free_after_nbytes: int = 0) -> BenchFamily:
    """Return the family in the folder, made if it is not there.

    Args:
        folder: one that holds ``base`` and three models is taken as it is.
        scale: a key of ``FAMILIES``.
        free_after_nbytes: space that has to remain for what is written later.

    Raises:
        click.ClickException: the disk is too small, or the folder holds something else.
    """
    folder = folder.resolve()
    shape = FAMILIES[scale].shape
    paths = [folder / name for name in (BASE_NAME, *NAMES)]
    nbytes = family_nbytes(shape, len(NAMES))
    present = [path for path in paths if path.is_dir()]
    if not present:
        free = free_nbytes(folder)
        if free < nbytes + free_after_nbytes:
            raise click.ClickException(
                f"{folder}: too little space for the family: got {free / 1e9:.1f} GB free, expected "
                f"{(nbytes + free_after_nbytes) / 1e9:.1f} GB; choose another disk with --family-folder"
            )
        click.echo(f"making a family of {nbytes / 1e9:.1f} GB in {folder}", err=True)
        make_family(folder, shape=shape, max_shard_nbytes=FAMILIES[scale].max_shard_nbytes, seed=_SEED)
    elif len(present) < len(paths):
        missing = ", ".join(path.name for path in paths if path not in present)
        raise click.ClickException(f"{folder}: an incomplete family, without {missing}; remove it, or choose another")
    elif free_nbytes(folder) < free_after_nbytes:
        raise click.ClickException(
            f"{folder}: too little space for the merged models: got {free_nbytes(folder) / 1e9:.1f} GB free, "
            f"expected {free_after_nbytes / 1e9:.1f} GB"
        )
    num_parameters = nbytes // (1 + len(NAMES)) // 2
    family = BenchFamily(paths[0], tuple(paths[1:]), num_parameters)
    if abs(family.model_nbytes - 2 * num_parameters) > 1 << 20:
        raise click.ClickException(f"{folder}: holds a family of another size than scale {scale}'s")
    return family


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--scale", type=click.Choice([str(scale) for scale in FAMILIES]), default="1", show_default=True)
def main(folder: Path, scale: str) -> None:
    """Make the family in FOLDER, unless it is there."""
    family = get_family(folder, scale=int(scale))
    size = f"{family.num_parameters / 1e9:.2f} B parameters, {family.model_nbytes / 1e9:.2f} GB per model"
    click.echo(f"{folder}: {size}")


if __name__ == "__main__":
    main()
