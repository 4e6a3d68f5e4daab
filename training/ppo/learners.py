"""What is learned from scored tables: PPO's policy, and two rivals on the same images.

A learner draws the tables of a step, learns from what they gained, and has a mean that is
exported. B tables of a step, laid out prompt by prompt, k to each; P free numbers of a table.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import cma
import torch
from torch import Tensor

from src.seeds import generator
from training.ppo.config import Ppo
from training.ppo.objectives import Taken, loss, movement, standardised
from training.ppo.policy import Draws, Policy, Start, stacked


class Clipped:
    """PPO: the policy's likelihood moves to the tables that gained, within a clipped ratio."""

    def __init__(self, start: Start, ppo: Ppo, seed: int) -> None:
        self.ppo, self.seed = ppo, seed
        self.policy = Policy(start, seed, ppo.learning_by_interval)
        self.optimiser = torch.optim.AdamW(self.policy.parameters(), lr=ppo.learning_rate)
        by_interval = ppo.entropy_by_interval or [1.0] * len(start.table.r)
        self.entropy = ppo.entropy_coef * torch.tensor(by_interval, dtype=torch.float64)

    @torch.no_grad()
    def draw(self, step: int, streams: Sequence[str]) -> Draws:
        """The tables of a step, one for each stream of random numbers, whatever the rank."""
        law = self.policy()
        if not self.ppo.antithetic:
            return stacked([law.draw(generator(self.seed, stream)) for stream in streams])
        pairs = [(streams[i - i % 2], bool(i % 2)) for i in range(len(streams))]
        return stacked([law.draw(generator(self.seed, s), mirror) for s, mirror in pairs])

    def update(self, step: int, draws: Draws, rewards: Tensor, gains: Tensor) -> dict[str, float]:
        """Learn from rewards [B] and advantages [B], NaN where there is none -> measurements.

        Raises ValueError for a step that is no number, before it changes anything.
        """
        ppo, policy = self.ppo, self.policy
        with torch.no_grad():
            log_prob = policy().log_prob(draws)
        valid = gains.isfinite().nonzero()[:, 0]
        if not len(valid):  # a step without any reward teaches nothing
            return {}
        taken = Taken(draws, log_prob, standardised(gains)).rows(valid)
        measured = []
        for epoch in range(ppo.ppo_epochs):
            source = generator(self.seed, f"order/{step}/{epoch}")
            order = torch.randperm(len(valid), generator=source)
            for index in order.split(ppo.minibatch_size):
                laws, taken_now = (policy(), policy.initial()), taken.rows(index)
                how = (ppo.clip_range, ppo.kl_coef, self.entropy)
                value, numbers = loss(*laws, taken_now, *how)
                self.optimiser.zero_grad(set_to_none=True)
                value.backward()
                norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), ppo.max_grad_norm)
                numbers["grad_norm"] = norm.item()
                if not all(map(math.isfinite, numbers.values())):
                    raise ValueError(f"a step of the policy is {numbers}: lower ppo.learning_rate")
                self.optimiser.step()
                measured.append(numbers)
        numbers = {name: sum(m[name] for m in measured) / len(measured) for name in measured[0]}
        with torch.no_grad():  # each of those was taken before its own update
            log_ratio = policy().log_prob(taken.draws) - taken.log_prob
        return numbers | movement(log_ratio, ppo.clip_range)

    @torch.no_grad()
    def mean(self) -> Draws:
        """The table that is exported."""
        return self.policy().mean()

    def state(self) -> dict[str, Any]:
        """All that changes, as tensors and plain values."""
        parts = {"policy": self.policy, "optimiser": self.optimiser}
        return {n: p.state_dict() for n, p in parts.items()} | {"learning": "of outputs"}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state; KeyError or RuntimeError where it is another's."""
        if self.ppo.learning_by_interval:  # its factors were of gradients once, which did little
            state["learning"]
        self.policy.load_state_dict(state["policy"])
        self.optimiser.load_state_dict(state["optimiser"])


class Evolution:
    """CMA-ES (Hansen 2016, arXiv:1604.00772, by `cma`): k candidates, each on all prompts.

    Its state is what each generation scored: the same answers make the same strategy again.
    """

    def __init__(self, start: Start, ppo: Ppo, seed: int) -> None:
        self.start, self.ppo, self.seed = start, ppo, seed
        self.load({"scores": []})

    def normal(self, *shape: int) -> Any:
        """Standard normal numbers that hang on the seed and the generation alone."""
        stream = f"cma/{len(self.scores)}/{self.asked}"
        self.asked += 1
        source = generator(self.seed, stream)
        return torch.randn(*shape, generator=source, dtype=torch.float64).numpy()

    def draw(self, step: int, streams: Sequence[str]) -> Draws:
        rows = [torch.from_numpy(row) for row in self.ask()]
        candidates = torch.stack(rows).repeat(len(streams) // self.ppo.rloo_k, 1)
        return self.start.draws(candidates)

    def ask(self) -> Any:
        """The candidates [k, P] of this generation."""
        if self.candidates is None:  # else they have no scores yet
            self.asked = 0
            self.candidates = self.strategy.ask()
        return self.candidates

    def update(self, step: int, draws: Draws, rewards: Tensor, gains: Tensor) -> dict[str, float]:
        scores = gains.reshape(-1, self.ppo.rloo_k).nanmean(0)
        finite = scores[scores.isfinite()]
        if not len(finite) or finite.min() == finite.max():  # the same again, on other prompts
            return {}
        worst = finite.min()
        self.tell(scores.where(scores.isfinite(), worst).tolist())
        return {"sigma": float(self.strategy.sigma)}

    def tell(self, scores: list[float]) -> None:
        """Learn from what the candidates scored."""
        self.strategy.tell(self.candidates, [-score for score in scores])
        self.scores.append(scores)
        self.candidates = None

    def mean(self) -> Draws:
        return self.start.draws(torch.tensor(self.strategy.mean))

    def state(self) -> dict[str, Any]:
        return {"scores": self.scores}

    def load(self, state: dict[str, Any]) -> None:
        options = {"popsize": self.ppo.rloo_k, "seed": math.nan, "randn": self.normal}
        options |= {"verbose": -9}
        self.scores: list[list[float]] = []
        self.candidates: Any = None
        self.strategy = cma.CMAEvolutionStrategy([0.0] * self.start.size, 1.0, options)
        for scores in state["scores"]:
            self.ask()
            self.tell(scores)


class Quotients:
    """Difference quotients of the mean reward along random signs (Spall 1992), taken by Adam.

    Pairs of tables on the same prompt and noise stand opposite to each other around the mean.
    """

    def __init__(self, start: Start, ppo: Ppo, seed: int) -> None:
        self.start, self.ppo, self.seed = start, ppo, seed
        self.centre = torch.zeros(start.size, dtype=torch.float64)
        self.optimiser = torch.optim.Adam([self.centre], lr=ppo.learning_rate)

    def draw(self, step: int, streams: Sequence[str]) -> Draws:
        sources = (generator(self.seed, streams[i - i % 2]) for i in range(len(streams)))
        size = self.start.size
        ways = [2.0 * torch.randint(2, (size,), generator=source) - 1 for source in sources]
        self.ways = torch.stack([-w if i % 2 else w for i, w in enumerate(ways)]).double()
        return self.start.draws(self.centre + self.ways)

    def update(self, step: int, draws: Draws, rewards: Tensor, gains: Tensor) -> dict[str, float]:
        pairs = rewards.reshape(-1, 2)
        slope = (pairs[:, 0] - pairs[:, 1]) / 2
        valid = slope.isfinite()
        if not bool(valid.any()):
            return {}
        gradient = (slope[valid, None] * self.ways[::2][valid]).mean(0)
        self.centre.grad = -gradient
        self.optimiser.step()
        return {"grad_norm": gradient.norm().item()}

    def mean(self) -> Draws:
        return self.start.draws(self.centre)

    def state(self) -> dict[str, Any]:
        return {"centre": self.centre.clone(), "optimiser": self.optimiser.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.centre.copy_(state["centre"])
        self.optimiser.load_state_dict(state["optimiser"])


Learner: TypeAlias = Clipped | Evolution | Quotients
METHODS = {"ppo": Clipped, "cma": Evolution, "quotients": Quotients}
"""The learners that `ppo.method` names: (start, ppo, seed) -> one at its beginning."""
