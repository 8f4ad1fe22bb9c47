"""Integer tensors of a merge: copied, so they have to be the same in all checkpoints."""

from __future__ import annotations

from .errors import PlanError
from .input_files import InputFiles
from .plan import MergePlan
from .plan_checks import exclude_hint
from .untrusted import brief

_COMPARE_NBYTES = 4 << 20


def check_buffers(plan: MergePlan, files: InputFiles) -> None:
    """Compare the integer tensors of all checkpoints; raises PlanError where a model's differ from the base's."""
    for buffer in plan.buffers:
        base = buffer.source
        for label, source in buffer.others:
            same = source.dtype is base.dtype and source.nbytes == base.nbytes
            for first in range(0, base.nbytes if same else 0, _COMPARE_NBYTES):
                count = min(_COMPARE_NBYTES, base.nbytes - first)
                if files.read(base, first, count) != files.read(source, first, count):
                    same = False
                    break
            if not same:
                raise PlanError(
                    f"integer tensor {brief(base.name)} of {label} differs from the base's",
                    where=source.path,
                    got="other values" if source.dtype is base.dtype else source.dtype.name,
                    expected=f"the same {base.dtype.name} values as in {base.path}: integers cannot be merged",
                    hint=f"{exclude_hint(base.name)}; weights quantized to integers have to be converted to bf16 first",
                )
