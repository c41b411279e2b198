"""Do attacks reach what theory says they can, and no more? The project's samplers on data with a closed form.

    python benchmarks/attack_theory.py

Gaussian data and their exact denoiser, so that everything is known. (1) Who decides between two candidates: the
best attack on the outputs of a stochastic and a deterministic walk, beside its closed form and the certified
bound. (2) Ranks under a denoiser that changes nothing, beside the noise ceiling. (3) A planted leak, a tenth of
the source in the output, at much noise. (4) The re-run attacker, who draws each candidate again, with the noise
key and without. Interval and error columns are standard errors of the measured rate.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import figures
import numpy as np
import report
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from boomerang_batch.diffusion.boomerang import KeyedNoise, boomerang
from boomerang_batch.diffusion.noise import noise_key
from boomerang_batch.diffusion.samplers import build_solver
from boomerang_batch.diffusion.schedule import Schedule, build_schedule
from boomerang_batch.measures.attackers import attack, training_half
from boomerang_batch.measures.bound import two_candidate_accuracy
from boomerang_batch.measures.ceiling import exceeds, noise_ceiling
from boomerang_batch.measures.linkability import linkability
from tests.oracles import Oracle, gaussian_oracle, linear_levels

LEVELS = linear_levels()
S2, SIZE, STEPS = 0.25, 64, 20


class NoNoise:
    """The noiseless way, for the walk's gain."""

    def forward(self, node: int) -> torch.Tensor:
        """Nothing is added on the way out."""
        return torch.zeros(1, SIZE, 1, 1, dtype=torch.float64)

    def reverse(self, node: int) -> torch.Tensor:
        """Nor on the way back."""
        return self.forward(node)


def sources(count: int, seed: int, size: int = SIZE) -> torch.Tensor:
    """Records N(0, S2 I): (count, size, 1, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return math.sqrt(S2) * torch.randn(count, size, 1, 1, generator=generator, dtype=torch.float64)


def oracle_of(size: int = SIZE) -> Oracle:
    """The exact denoiser."""
    return gaussian_oracle(torch.zeros(size), S2 * torch.eye(size, dtype=torch.float64), LEVELS)


def walk(
    oracle: Oracle, x_0: torch.Tensor, t: tuple[str, float], *, eta: float, secret: bytes
) -> tuple[torch.Tensor, Schedule, Any]:
    """Outputs of `x_0` by the project's own code, with the schedule and solver that made them."""
    schedule = build_schedule(LEVELS, grid="linspace", steps=STEPS, t=t, start="exact")
    options = {"variance": "optimal", "data_variance": S2} if eta else {}
    solver = build_solver(schedule, prediction=oracle.spec.prediction, eta=eta, **options)
    keys = [noise_key(secret, identity=b"%d" % index, variant=0) for index in range(len(x_0))]
    return boomerang(x_0, oracle, schedule, solver, KeyedNoise(keys, x_0)), schedule, solver


def two_candidates(timestep: int, eta: float, pairs: int) -> dict[str, float]:
    """How often the likelier candidate is the source."""
    oracle, both = oracle_of(), sources(2 * pairs, timestep)
    source, other = both[:pairs], both[pairs:]
    output, schedule, solver = walk(oracle, source, ("timestep", timestep), eta=eta, secret=bytes(32))
    gain = boomerang(torch.ones_like(source[:1]), oracle, schedule, solver, NoNoise()).flatten()[0]
    nearer = (output - gain * source).flatten(1).norm(dim=1) < (output - gain * other).flatten(1).norm(dim=1)
    sigma = schedule.relative_sigma
    apart = (source - other).flatten(1).norm(dim=1).tolist()
    rho = S2 / (S2 + sigma**2)
    softened = math.sqrt(S2 * (1 - rho**2)) / rho
    measured = float(nearer.double().mean())
    ceiling = float(np.mean([two_candidate_accuracy(distance / sigma) for distance in apart]))
    closed = float(np.mean([two_candidate_accuracy(distance / softened) for distance in apart]))
    return {
        "timestep": timestep,
        "eta": eta,
        "sigma": sigma,
        "measured": measured,
        "error": math.sqrt(max(measured * (1 - measured), 1e-9) / pairs),
        "closed_form": closed if eta else ceiling,
        "bound": ceiling,
    }


def identity_ranks(sigma: float, count: int) -> dict[str, float]:
    """Rank-1 under a denoiser that gives back what it gets, among records of the same of ten labels."""
    x_0 = sources(count, 1, 16)
    identity = Oracle(lambda x, alpha, sigma: x / alpha, (16, 1, 1), LEVELS)
    output, _, _ = walk(identity, x_0, ("sigma", sigma), eta=0.0, secret=bytes(32))
    rows, groups = x_0.flatten(1).numpy(), np.arange(count) % 10
    found = linkability(output.flatten(1).numpy(), rows, groups=groups).rank[1]
    ceiling = noise_ceiling(rows, np.full(count, sigma), groups=groups, draws=10).rank[1]
    error = math.sqrt(sum(one.value * (1 - one.value) / one.trials for one in (found, ceiling)))
    return {
        "sigma": sigma,
        "measured": found.value,
        "ceiling": ceiling.value,
        "errors_apart": abs(found.value - ceiling.value) / max(error, 1e-9),
        "chance": 10 / count,
    }


def leak(share: float, sigma: float, count: int) -> dict[str, Any]:
    """Outputs with a share of their sources in them, and whether ranks above the ceiling give it away."""
    x_0 = sources(count, 2)
    output, _, _ = walk(oracle_of(), x_0, ("sigma", sigma), eta=1.0, secret=bytes(32))
    rows = x_0.flatten(1).numpy()
    mixed = (1 - share) * output.flatten(1).numpy() + share * rows
    groups, rest = np.arange(count) % 10, ~training_half(np.arange(count))
    ceiling = noise_ceiling(rows[rest], np.full(int(rest.sum()), sigma), groups=groups[rest], draws=5).rank[1]
    plain = linkability(mixed[rest], rows[rest], groups=groups[rest]).rank[1]
    trained = attack(mixed, rows, groups=groups).linkability.rank[1]
    return {
        "share": share,
        "sigma": sigma,
        "ceiling": ceiling.value,
        "nearest": plain.value,
        "nearest_p": exceeds(plain, ceiling).p_value,
        "trained": trained.value,
        "trained_p": exceeds(trained, ceiling).p_value,
    }


def re_run(sigma: float, pairs: int) -> dict[str, float]:
    """Two candidates, each drawn again: under the run's own noise, and under another's."""
    both = sources(2 * pairs, 3)
    source, other = both[:pairs], both[pairs:]
    oracle, t = oracle_of(), ("sigma", sigma)
    output, _, _ = walk(oracle, source, t, eta=1.0, secret=bytes(32))
    bound = float(
        np.mean([two_candidate_accuracy(d / sigma) for d in (source - other).flatten(1).norm(dim=1).tolist()])
    )
    found = {"sigma": sigma, "bound": bound}
    for name, secret in (("with the secret", bytes(32)), ("without", b"1" * 32)):
        again = [walk(oracle, candidate, t, eta=1.0, secret=secret)[0] for candidate in (source, other)]
        near = [(output - one).flatten(1).norm(dim=1) for one in again]
        found[name] = float((near[0] < near[1]).double().mean())
    return found


def panels(record: dict[str, Any]) -> list[figures.Panel]:
    """What was measured beside what it should be, over sigma."""
    found = record["found"]["decided"]

    def theory(name: str) -> figures.Line:
        return figures.Line(points=[(one["sigma"], one[name]) for one in found if one["eta"]], theory=True)

    def measured(eta: float) -> figures.Line:
        these = [one for one in found if one["eta"] == eta]
        return figures.Line(
            points=[(one["sigma"], one["measured"]) for one in these],
            around=[
                (one["measured"] - 1.96 * one["error"], one["measured"] + 1.96 * one["error"]) for one in these
            ],
        )

    lines = {
        "measured, eta 0": measured(0.0),
        "measured, eta 1": measured(1.0),
        "certified bound": theory("bound"),
        "closed form, eta 1": theory("closed_form"),
    }
    return [
        figures.Panel(
            title="How often the attacker is right about two candidates",
            x="sigma",
            y="share of pairs",
            lines=lines,
            level=("chance", 0.5),
            log="x",
        )
    ]


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    options = parser.parse_args()
    pairs = options.pairs
    decided = [two_candidates(t, eta, pairs) for eta in (1.0, 0.0) for t in (150, 300, 450, 600, 750)]
    ranks = [identity_ranks(sigma, 2000) for sigma in (0.2, 0.5, 1.0, 2.0, 6.0)]
    leaks = [leak(share, sigma, 4000) for share in (0.0, 0.1) for sigma in (6.0, 12.0)]
    again = [re_run(sigma, pairs) for sigma in (2.0, 5.0, 10.0)]
    parts = [
        "# Attacks on data with a closed form",
        f"Records N(0, {S2} I) of {SIZE} numbers, the exact denoiser, {STEPS} steps.",
        "## Deciding between two candidates",
        report.table(
            ["t", "eta", "sigma", "measured", "standard error", "closed form", "certified bound"],
            [
                [
                    one["timestep"],
                    f"{one['eta']:g}",
                    f"{one['sigma']:.2f}",
                    f"**{one['measured']:.4f}**",
                    f"{one['error']:.4f}",
                    f"{one['closed_form']:.4f}",
                    f"{one['bound']:.4f}",
                ]
                for one in decided
            ],
        ),
        "## Rank-1 under a denoiser that changes nothing, ten labels known",
        report.table(
            ["sigma", "measured", "noise ceiling", "standard errors apart", "chance"],
            [
                [
                    f"{one['sigma']:g}",
                    f"**{one['measured']:.4f}**",
                    f"{one['ceiling']:.4f}",
                    f"{one['errors_apart']:.1f}",
                    f"{one['chance']:.4f}",
                ]
                for one in ranks
            ],
        ),
        "## A planted leak",
        report.table(
            ["of the source in the output", "sigma", "ceiling", "nearest", "p", "trained", "p"],
            [
                [
                    f"{one['share']:.0%}",
                    f"{one['sigma']:g}",
                    f"{one['ceiling']:.4f}",
                    f"{one['nearest']:.4f}",
                    f"{one['nearest_p']:.1g}",
                    f"**{one['trained']:.4f}**",
                    f"{one['trained_p']:.1g}",
                ]
                for one in leaks
            ],
        ),
        "## The re-run attacker, two candidates",
        report.table(
            ["sigma", "with the secret", "without", "certified bound"],
            [
                [
                    f"{one['sigma']:g}",
                    f"**{one['with the secret']:.4f}**",
                    f"{one['without']:.4f}",
                    f"{one['bound']:.4f}",
                ]
                for one in again
            ],
        ),
    ]
    found = {"decided": decided, "ranks": ranks, "leaks": leaks, "re_run": again}
    record = {"machine": report.machine(1), "found": found}
    report.publish("attack_theory", record, "\n\n".join(parts), folder=options.results)
    figures.draw(panels(record), options.results / "attack_theory.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
