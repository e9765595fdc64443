"""Importance ratios by length: product of tokens, GSPO's geometric mean, single tokens.

Claims of the survey (GSPO, arXiv:2507.18071): ratios of single tokens are noise that piles up with
length, a ratio of the whole response without normalisation varies too much, and its length-th root
is steady; GSPO's narrow range (3e-4, 4e-4) clips two orders of magnitude more tokens than GRPO's
0.2 (15% against 0.13%), and trains better still. On small MDPs all three variances are exact; on
the model they are measured where they occur: on the minibatches of a batch that is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from claim import Options, Verdict, claim_options, interval, train, write
from matplotlib.figure import Figure
from survey import Learner, adam, functions, outcome, seeded, settings

from lmrl_env.exact import TabularPolicy, TokenMDP, enumerate_trajectories
from lmrl_env.types import BatchTotals

KINDS = {"product": "product of tokens", "geometric": "GSPO: geometric mean", "token": "one token"}
COLORS = {"product": "C7", "geometric": "C5", "token": "C3"}
LEARNING_RATES = {"tiny": (1e-5, 5e-5, 2e-4), "paper": (1e-6,)}
FILES = {"grpo": "C3", "dapo": "C4", "gspo": "C5", "cispo": "C6"}
UPDATES = 8
HORIZONS = range(1, 8)
WORLDS = 20
NOISE = 0.1


def exact_variances(horizon: int, seed: int) -> dict[str, float]:
    """Return the variances of three ratios under the old policy, responses all of one length.

    Args:
        horizon: tokens of every response, out of a vocabulary of 3.
        seed: of the old policy; the new one's logits differ by noise of ``NOISE``.
    """
    mdp = TokenMDP(3, horizon, reward=lambda question, tokens, terminated: 0.0)
    old, new = TabularPolicy(mdp, seed), TabularPolicy(mdp, seed)
    new.logits.data += NOISE * TabularPolicy(mdp, seed + 10_000).logits.data
    responses = enumerate_trajectories(mdp, old)
    with torch.no_grad():
        gaps = responses.logprobs(new) - responses.logprobs(old)  # (L, K)
    return variances(gaps, responses.mask, responses.probs)


def variances(gaps: torch.Tensor, mask: torch.Tensor, probs: torch.Tensor) -> dict[str, float]:
    """Return the variances of the three ratios.

    Args:
        gaps: shape (N, K), new log-prob less the old one; 0 outside the mask.
        mask: shape (N, K), bool.
        probs: shape (N,), of the responses, summing to 1.

    >>> gaps, mask = torch.tensor([[0.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> variances(gaps, mask, torch.ones(1))
    {'product': 0.0, 'geometric': 0.0, 'token': 0.0}
    """
    total, lengths = gaps.sum(1), mask.sum(1)
    tokens = (probs / lengths)[:, None].expand_as(gaps)[mask]
    values = {
        "product": (total.exp(), probs),
        "geometric": ((total / lengths).exp(), probs),
        "token": (gaps[mask].exp(), tokens),
    }
    means = {name: (x * p).sum() for name, (x, p) in values.items()}
    return {name: float((p * (x - means[name]) ** 2).sum()) for name, (x, p) in values.items()}


def off_policy_rows(learner: Learner, lr: float, seed: int) -> dict[str, Any]:
    """Train on a batch by GRPO in eight updates, and look at each minibatch before its update.

    Returns:
        Log-ratios (N, K) and their mask of the rows from the second minibatch on, and by file the
        share of their tokens that its loss clips.
    """
    learner.reset()
    batch = learner.sample(seed)
    old, size = learner.logprobs(batch), learner.group_size
    grpo = functions("grpo")
    advantages = grpo.compute_advantages(torch.from_numpy(batch.rewards), size).float()
    optimizer = adam(learner.policy, lr)
    gaps, chosen, clipped = [], [], {name: 0.0 for name in FILES}
    for update, rows in enumerate(np.array_split(np.arange(len(old)), UPDATES)):
        if update:
            part = batch.take(rows)
            now, mask = learner.logprobs(part), torch.from_numpy(part.mask)
            gaps.append((now - old[rows]).where(mask, 0.0))
            chosen.append(mask)
            totals = BatchTotals(len(rows), int(mask.sum()), mask.shape[1])
            for name in FILES:
                loss = functions(name).policy_loss
                metrics = loss(now, old[rows], advantages[rows], mask, totals)[1]
                for side in ("low", "high"):
                    clipped[name] += float(metrics[f"policy/clip_fraction_{side}"]) / (UPDATES - 1)
        learner.backward(batch, rows, advantages, old, grpo.policy_loss)
        torch.nn.utils.clip_grad_norm_(learner.policy.parameters(), 1.0)
        optimizer.step()
    return {"gaps": torch.cat(gaps), "mask": torch.cat(chosen), "clipped": clipped}


def by_length(gaps: torch.Tensor, mask: torch.Tensor) -> list[dict[str, float]]:
    """Return variances in four buckets of length, by quartiles."""
    lengths = mask.sum(1).numpy()
    bounds = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75]))
    bucket = np.digitize(lengths, bounds, right=True)
    found = []
    for number in range(len(bounds) + 1):
        rows = torch.from_numpy(bucket == number)
        if rows.sum() > 1:
            probs = torch.full((int(rows.sum()),), 1 / int(rows.sum()))
            length = float(lengths[bucket == number].mean())
            found.append({"length": length, **variances(gaps[rows], mask[rows], probs)})
    return found


def slope(points: list[dict[str, float]], kind: str) -> float:
    """Return the exponent of a variance over length, by least squares of the logarithms.

    >>> slope([{"length": 1.0, "token": 1.0}, {"length": 2.0, "token": 4.0}], "token")
    2.0
    """
    x = np.log([point["length"] for point in points])
    y = np.log([point[kind] for point in points])
    return float(np.polyfit(x, y, 1)[0])


def measure(options: Options) -> dict[str, Any]:
    """Return the exact figures, and those of the model by learning rate."""
    exact = {
        str(horizon): {kind: float(np.median([world[kind] for world in worlds])) for kind in KINDS}
        for horizon in HORIZONS
        for worlds in [[exact_variances(horizon, seed) for seed in range(WORLDS)]]
    }
    points = [{"length": float(horizon), **values} for horizon, values in exact.items()]
    flags = settings(options)
    learner = Learner(str(flags["model"]), str(flags["questions"]), flags, groups=16)
    measured = {}
    for lr in LEARNING_RATES[options.scale]:
        found = [off_policy_rows(learner, lr, seed) for seed in range(options.seeds)]
        buckets = [by_length(own["gaps"], own["mask"]) for own in found]
        measured[f"{lr:g}"] = {
            "buckets": buckets,
            "slopes": {kind: interval([slope(b, kind) for b in buckets]) for kind in KINDS},
            "clipped": {name: interval([own["clipped"][name] for own in found]) for name in FILES},
        }
    slopes = {kind: slope(points, kind) for kind in KINDS}
    return {"exact": exact, "exact_slopes": slopes, "model": measured}


def judge(figures: Mapping[str, Any], seeds: int) -> Verdict:
    """Return the verdict: signs of the exponents, and two orders of magnitude in clipping."""
    model = figures["model"]
    slopes = [own["slopes"] for own in model.values()]
    signs = all(s["product"].low > 0 > s["geometric"].high for s in slopes)
    most = {lr: own["clipped"]["gspo"].mean / max(own["clipped"]["grpo"].mean, 1e-9)
            for lr, own in model.items()}  # fmt: skip
    orders = any(ratio >= 30 for ratio in most.values())
    clipping = "; ".join(
        f"lr {lr}: GSPO {100 * own['clipped']['gspo'].mean:.3g}% of tokens, GRPO "
        f"{100 * own['clipped']['grpo'].mean:.3g}%, variance ∝ length^"
        f"{own['slopes']['product'].mean:.2f} (product), ^{own['slopes']['geometric'].mean:.2f} "
        f"(geometric mean), ^{own['slopes']['token'].mean:.2f} (token)"
        for lr, own in model.items()
    )
    exact = figures["exact_slopes"]
    return Verdict(
        "survey: GSPO",
        "A product of token ratios varies the more the longer a response is, GSPO's root the less, "
        "and GSPO clips two orders of magnitude more tokens than GRPO.",
        f"Exact, {WORLDS} MDPs: variance ∝ length^{exact['product']:.2f} (product), "
        f"^{exact['geometric']:.2f} (geometric mean), ^{exact['token']:.2f} (token). "
        f"On the model, in the minibatches 2 to {UPDATES} of a batch: {clipping}.",
        outcome(signs, orders),
        "GSPO's range is 500 times narrower than GRPO's and its ratio √|o| times steadier, so the "
        "factor between the shares depends on how far an update moves the policy: hence several "
        "learning rates. A clipped response loses all its tokens at once.",
        f"{seeds} batches of 16 × 8 a learning rate",
    )


def plot(figures: Mapping[str, Any]) -> Figure:
    """Draw variances over length, exact and measured, and clipped shares by learning rate."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    exact, model, clipped = figure.subplots(1, 3)
    for kind, label in KINDS.items():
        lengths = [int(horizon) for horizon in figures["exact"]]
        exact.plot(lengths, [own[kind] for own in figures["exact"].values()], "o-",
                   color=COLORS[kind], label=label)  # fmt: skip
        last = list(figures["model"].values())[-1]
        for number, buckets in enumerate(last["buckets"]):
            model.plot([b["length"] for b in buckets], [b[kind] for b in buckets], "o-",
                       color=COLORS[kind], alpha=0.4, markersize=3,
                       label=None if number else label)  # fmt: skip
    exact.set_title("exact, small MDPs (median)")
    model.set_title(f"model, lr {list(figures['model'])[-1]}, a line a batch")
    for axes in (exact, model):
        axes.set_xlabel("length of the response, tokens")
        axes.set_ylabel("variance of the ratio")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(fontsize=8)
    places = np.arange(len(figures["model"]))
    for number, (name, color) in enumerate(FILES.items()):
        shares = [100 * own["clipped"][name].mean for own in figures["model"].values()]
        clipped.bar(places + 0.2 * (number - 1.5), shares, 0.2, color=color, label=name)
    clipped.set_xticks(places, list(figures["model"]))
    clipped.set_xlabel("learning rate")
    clipped.set_ylabel("clipped tokens, %")
    clipped.set_yscale("log")
    clipped.set_title("clipped, minibatches 2 to 8")
    clipped.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    return figure


@claim_options(seeds=6)
def main(options: Options) -> None:
    """Compare the variance of three importance ratios, and the tokens that four losses clip."""
    if not options.is_tiny:
        runs = [
            job
            for name in FILES
            for job in seeded(f"ratios-{name}", name, options.seeds, settings(options))
        ]
        train(options, runs)
    elif options.dry_run:
        return
    figures = measure(options)
    write(options, "sequence_ratios", "Importance ratios by length", judge(figures, options.seeds),
          figures, plot(figures))  # fmt: skip


if __name__ == "__main__":
    main()
