"""How far the paper's two assumptions hold: linearity (Property 5) and orthogonality (Property 6).

Linearity: with f the logits, θ(α) = θ₀ + α τ_t, and the linearised network f_lin(α) = f(θ₀) + α ⟨∇f(θ₀), τ_t⟩,

    error(α) = ‖f(θ(α)) − f_lin(α)‖ / ‖f(θ(α)) − f(θ₀)‖

over held-out text of the task; 0 in the linear regime, 1 where the linear part explains nothing.

Orthogonality needs no code: ``metagpt-fast measure`` prints the cosines between the task vectors.
"""

from __future__ import annotations

from pathlib import Path

import torch
from gpt import load, load_state, windows_of
from texts import Tokens
from torch.func import functional_call, jvp

ALPHAS = (0.1, 0.25, 0.5, 1.0)
_NUM_WINDOWS = 16


def linearity_errors(base: Path, model: Path, text: Tokens) -> dict[str, float]:
    """Return error(α) by α."""
    network = load(base).eval()
    start = dict(load_state(base))
    end = load_state(model)
    delta = {name: end[name] - start[name] for name in start}
    tokens = windows_of(text, _NUM_WINDOWS, network.shape.context)

    def logits(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        result: torch.Tensor = functional_call(network, parameters, (tokens,))
        return result

    with torch.no_grad():
        at_base, slope = jvp(logits, (start,), (delta,))
        errors = {}
        for alpha in ALPHAS:
            exact = logits({name: start[name] + alpha * delta[name] for name in start})
            error = (exact - at_base - alpha * slope).norm() / (exact - at_base).norm()
            errors[str(alpha)] = error.item()
    return errors
