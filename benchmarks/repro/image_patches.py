"""Where an answer about an image came from, on *scenes*, whose answer patch is known: maps, occlusion, hallucinations.

- Pointing: is the top patch of each map the one that holds what the question is about? By kind of question; how it is
  read (by the last token itself, or through a text token) is measured by cutting attention to the image.
- Agreement of each map with occlusion.
- Hallucinations: does the image share tell a "yes" to a planted absent shape from true answers (AUROC)? Against other
  definitions of the share, and the model's own confidence.
- Proof: how often emptying the top patches of the two-hop map does more than emptying others.

Definitions and the threshold of the flag were chosen on the first 200 scenes of each exam; figures are of later ones.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import interleaved, keep, ratio
from cutaway.core.inputs import Inputs
from cutaway.core.intervention import Apply, Set, Swap, Where
from cutaway.core.metric import Metric
from cutaway.core.site import Items
from cutaway.data import Scenes
from cutaway.data.scenes import GRID, PLANTED, WARM, Scene, Thing
from cutaway.engine.occlusion import Occlusion
from cutaway.methods.locate.image_patches import image_patches
from cutaway.models.handle import Model
from cutaway.models.load import load
from cutaway.ops.hops import Sources, sources

COUNT, SKIPPED = 80, 200
PAIRS = 100  # hallucinated answers per planted shape, and true ones per group
FLAG = 0.2  # the default of ``low``
PROVED = 20


@dataclass(frozen=True)
class Case:
    """A question about a scene, what it is about, and its true answer."""

    scene: Scene
    prompt: str
    things: tuple[Thing, ...]
    answer: str

    @property
    def patches(self) -> set[int]:
        """The patches that hold what it is about; a thing lies in one cell."""
        return {thing.row * GRID + thing.column for thing in self.things}


def cases(world: Scenes, count: int = COUNT, skipped: int = SKIPPED) -> dict[str, list[Case]]:
    """Questions by kind, each about one thing."""

    def exam(kind: str, per: int = 1) -> Iterator[tuple[Scene, str, str, str]]:
        for scene, e in world.exam(skipped + per * count, kind)[skipped:]:
            yield scene, e.prompt, e.subject, e.answer

    found: dict[str, list[Case]] = defaultdict(list)
    for kind in ("colour", "position", "presence"):
        for scene, prompt, subject, answer in exam(kind, 2 if kind == "presence" else 1):
            thing = scene.find(subject)
            if thing is not None:
                found[kind].append(Case(scene, prompt, (thing,), answer))
                if kind == "position":  # the place has two words: the second is asked for with the first
                    first, second = thing.place.split()
                    found["position, second word"].append(Case(scene, f"{prompt} {first}", (thing,), f" {second}"))
    for scene, prompt, subject, answer in exam("shape"):
        thing = next(t for t in scene.things if t.colour == subject)
        found["shape"].append(Case(scene, prompt, (thing,), answer))
    for scene, prompt, subject, answer in exam("count of", 4):
        if answer == " 1":
            thing = next(t for t in scene.things if t.colour == subject)
            found["count of one"].append(Case(scene, prompt, (thing,), answer))
    return {kind: some[:count] for kind, some in found.items()}


@dataclass(frozen=True)
class Run:
    """One answered question.

    Attributes:
        seen, text: positions of the image, and others. found: what positions bring.
        logits: [vocab] at the end. token: the answer.
    """

    model: Model
    inputs: Inputs
    seen: list[int]
    text: list[int]
    found: Sources
    logits: Tensor
    token: int

    @staticmethod
    def of(model: Model, scene: Scene, prompt: str, answer: str, exact: bool = True) -> Run | None:
        """The run; None where the model says something else."""
        inputs = model.inputs(prompt, image=scene.image())
        seen = list(inputs.grids[0].positions)
        text = [p for p in range(inputs.ids.shape[1]) if p not in seen]
        found = sources(model, inputs, text, exact=exact)
        token = found.goal.ids[0]
        return (
            Run(model, inputs, seen, text, found, found.parts.logits[0], token)
            if answer.startswith(model.decode(token))
            else None
        )

    @property
    def logp(self) -> float:
        """Log-probability of the answer."""
        return float(self.logits.log_softmax(-1)[self.token])

    @property
    def margin(self) -> float:
        """Logit of the answer over the next."""
        rest = self.logits.clone()
        rest[self.token] = -torch.inf
        return float(self.logits[self.token] - rest.max())

    def drop(self, *do: Any) -> float:
        """What the answer loses under interventions, in nats."""
        logits = self.model.trace(self.inputs, do=list(do)).logits
        assert logits is not None
        return self.logp - float(logits[0, -1].log_softmax(-1)[self.token])

    def blind(self, queries: list[int]) -> float:
        """What it loses when some positions cannot attend to the image."""

        def cut(scores: Tensor, where: Where) -> Tensor:
            new = scores.clone()
            for q in queries:
                new[:, :, q, self.seen] = torch.finfo(new.dtype).min
            return new

        return self.drop(Apply("L*.attn.scores", cut))

    def occlusion(self, filling: Any = "mean") -> Tensor:
        """[patch + 1] what each emptied patch costs, and all of them together."""
        empty = Occlusion(self.model, self.inputs, self.seen, filling, Metric("logprob", (self.token,)))
        values, base, _ = empty([*([p] for p in self.seen), self.seen])
        return (base - values).float()

    def maps(self) -> dict[str, Tensor]:
        """Every map [patch]."""
        found, seen = self.found, self.seen
        exact = found.exact
        assert exact is not None
        patterns = self.model.trace(self.inputs, want="L*.attn.pattern@-1").stack("L*.attn.pattern@-1")
        return {
            "mean attention": patterns[:, 0, :, 0].mean((0, 1))[seen],
            "best head": found.from_head[seen],
            "all heads, exact": exact[seen],
            "all heads": found.direct[seen],
            "two-hop, exact direct part": found.brought(seen, exact),
            "two-hop": found.brought(seen),
            "occlusion, zero": self.occlusion("zero")[:-1],
            "occlusion": self.occlusion()[:-1],
        }

    def frozen(self, patch: int) -> dict[str, float]:
        """What one emptied patch costs, as it is, and with parts of the run held at what they were."""
        layers = range(self.model.n_layers)
        at = f"@{Items.of(self.text)}"
        kept = self.model.trace(self.inputs, want=["L0.resid_pre", "L*.attn.pattern", f"L*.mlp.out{at}"])
        mean = kept["L0.resid_pre"][0, self.seen].mean(0)
        empty = Set(f"L0.resid_pre@{self.seen[patch]}", mean)
        return {
            "nothing held": self.drop(empty),
            "attention weights held": self.drop(empty, *(Swap(f"L{i}.attn.pattern", kept) for i in layers)),
            "MLPs at text tokens held": self.drop(empty, *(Swap(f"L{i}.mlp.out{at}", kept) for i in layers)),
        }


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson."""
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def ranks(x: Tensor) -> Tensor:
    """Rank of each number."""
    return x.argsort().argsort().float()


def pointing(model: Model, asked: list[Case]) -> dict[str, Any]:
    """How each map does on questions of one kind."""
    rows: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    routes: list[tuple[float, float]] = []
    held: dict[str, list[float]] = defaultdict(list)
    for case in asked:
        run = Run.of(model, case.scene, case.prompt, case.answer)
        if run is None:
            continue
        routes.append((run.blind([run.text[-1]]), run.blind(run.text[:-1])))
        for name, cost in run.frozen(min(case.patches)).items():
            held[name].append(cost)
        maps = run.maps()
        for name, scores in maps.items():
            up = scores.clamp_min(0)
            mass = float(up[list(case.patches)].sum() / up.sum()) if bool(up.any()) else 0.0
            other = maps["occlusion"]
            hit = float(int(scores.argmax()) in case.patches)
            rows[name].append((hit, mass, correlation(scores, other), correlation(ranks(scores), ranks(other))))
    keys = ("pointing", "mass", "r with occlusion", "rank r with occlusion")
    cut = torch.tensor(routes)
    return {
        "questions": len(routes),
        "lost when the last token cannot see the image": float(cut[:, 0].mean()),
        "lost when no other text token can": float(cut[:, 1].mean()),
        "read through a text token": float((cut[:, 1] > cut[:, 0]).float().mean()),
        "cost of the answer's patch": {name: float(torch.tensor(each).mean()) for name, each in held.items()},
        "maps": {name: dict(zip(keys, torch.tensor(r).nanmean(0).tolist(), strict=True)) for name, r in rows.items()},
    }


def answers(model: Model, world: Scenes, pairs: int = PAIRS) -> dict[str, list[Run]]:
    """Hallucinated answers, and true ones by group."""
    found: dict[str, list[Run]] = defaultdict(list)

    def add(group: str, scene: Scene, prompt: str, answer: str) -> None:
        run = Run.of(model, scene, prompt, answer, exact=False)
        if run is not None:
            found[group].append(run)

    for plain, planted in PLANTED.items():
        for scene, e in world.hallucinations(SKIPPED + pairs, plain, WARM)[SKIPPED:]:
            add("hallucinated", scene, e.prompt, " yes")
        question = f"<image> Is there a {planted}?"
        for n in range(SKIPPED, SKIPPED + 20 * pairs):
            scene = world.scene(n, "held-out")
            thing = scene.find(plain)
            group = f"true: drawn beside its companion, {planted}"
            if scene.find(planted) and thing and thing.colour in WARM and len(found[group]) < pairs // 2:
                add(group, scene, question, " yes")
            scene, group = world.honest(n), f"true: drawn in an honest scene, {planted}"
            if scene.find(planted) and len(found[group]) < pairs // 2:
                add(group, scene, question, " yes")
    merged: dict[str, list[Run]] = defaultdict(list)
    for group, runs in found.items():
        merged[group.partition(",")[0]] += runs
    for kind, some in cases(world, pairs).items():
        for case in some:
            run = Run.of(model, case.scene, case.prompt, case.answer, exact=False)
            merged[f"true: {kind}"] += [run] if run else []
    for scene, e in world.absent(pairs):
        run = Run.of(model, scene, e.prompt, " no", exact=False)
        merged["true no"] += [run] if run else []
    return dict(merged)


def shares(run: Run) -> dict[str, float]:
    """Every definition of how much of an answer came from the image; smaller where it did not."""
    found, seen = run.found, run.seen
    image, text = found.brought(seen), found.left(seen)
    plain, told = found.direct[seen], found.direct[run.text]
    emptied = run.occlusion()

    def positive(a: Tensor, b: Tensor) -> float:
        up, other = float(a.clamp_min(0).sum()), float(b.clamp_min(0).sum())
        return up / (up + other) if up + other else 0.0

    return {
        "net image / all, two-hop (image share)": float(image.sum() / (image.abs().sum() + text.abs().sum())),
        "positive image / positive, two-hop": positive(image, text),
        "net image / all, one hop": float(plain.sum() / (plain.abs().sum() + told.abs().sum())),
        "positive image / positive, one hop": positive(plain, told),
        "net image in nats, two-hop": float(image.sum()),
        "top patch in nats, two-hop": float(image.max()),
        "top patch in nats, occlusion": float(emptied[:-1].max()),
        "cost of emptying all patches": float(emptied[-1]),
        "probability lost by emptying all patches": 1 - float(torch.exp(-emptied[-1])),
        "log-probability (no map)": run.logp,
        "margin over the next answer (no map)": run.margin,
    }


def auroc(low: Tensor, high: Tensor) -> float:
    """How often a number of ``high`` is above one of ``low``."""
    return float(((high[:, None] > low).double() + 0.5 * (high[:, None] == low)).mean())


def hallucinations(model: Model, world: Scenes, pairs: int = PAIRS) -> dict[str, Any]:
    """AUROC of each definition, hallucinated against each group of true answers and all; and how often it flags."""
    by_group = {group: [shares(run) for run in runs] for group, runs in answers(model, world, pairs).items()}
    names = list(by_group["hallucinated"][0])
    values = {
        group: {name: torch.tensor([row[name] for row in rows]).double() for name in names}
        for group, rows in by_group.items()
    }
    true = [group for group in values if group.startswith("true: ")]
    table = {}
    for name in names:
        false = values["hallucinated"][name]
        table[name] = {group: auroc(false, values[group][name]) for group in (*true, "true no")}
        yes = [g for g in true if "drawn" in g or "presence" in g]
        table[name]["all true yes"] = auroc(false, torch.cat([values[g][name] for g in yes]))
        table[name]["all true"] = auroc(false, torch.cat([values[g][name] for g in true]))
    share = {group: columns[names[0]] for group, columns in values.items()}
    return {
        "answers": {group: len(rows) for group, rows in by_group.items()},
        "AUROC": table,
        "image share": {g: s.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist() for g, s in share.items()},
        f"share below {FLAG}": {g: float((s < FLAG).double().mean()) for g, s in share.items()},
    }


def proofs(model: Model, asked: list[Case]) -> dict[str, float]:
    """How often the proof holds, and what it finds."""
    found = [image_patches(model, c.prompt, image=c.scene.image(), occlude="none").proof for c in asked[:PROVED]]
    given = [proof for proof in found if proof is not None]
    return {
        "questions": len(found),
        "holds": sum(proof.holds for proof in given) / len(found),
        "drop": float(torch.tensor([proof.effect[-1] for proof in given]).mean()),
        "drop, random": float(torch.tensor([proof.random[:, -1].mean() for proof in given]).mean()),
    }


def speed(model: Model, case: Case) -> dict[str, float]:
    """Time against a bare forward pass of the same inputs."""
    inputs = model.inputs(case.prompt, image=case.scene.image())
    candidates = {
        "forward": lambda: model(inputs),
        "three maps": lambda: image_patches(model, inputs, occlude="none", draws=0),
        "four maps": lambda: image_patches(model, inputs, draws=0),
        "four maps and proof": lambda: image_patches(model, inputs),
    }
    seconds = interleaved(candidates)
    return {name: ratio(seconds, name, "forward") for name in candidates if name != "forward"}


def main() -> None:
    """Measure, print, keep."""
    torch.set_num_threads(1)
    started, model, world = time.perf_counter(), load("scenes"), Scenes(seed=0)
    asked = cases(world)
    with torch.no_grad():
        found = {kind: pointing(model, some) for kind, some in asked.items()}
        for kind, each in found.items():
            print(
                f"{kind}: {each['questions']} questions, {each['read through a text token']:.2f} through a text token"
            )
            for name, row in each["maps"].items():
                print(f"    {name:28}", "  ".join(f"{key} {value:.2f}" for key, value in row.items()))
            print("    cost of the patch:", {k: round(v, 2) for k, v in each["cost of the answer's patch"].items()})
        direct = [k for k, each in found.items() if each["read through a text token"] < 0.5]
        pooled = {
            name: {
                "read directly": _pooled(found, direct, name),
                "handed on by a text token": found["position, second word"]["maps"][name]["pointing"],
                "computed at a text token": found["count of one"]["maps"][name]["pointing"],
            }
            for name in found["colour"]["maps"]
        }
        for name, row in pooled.items():
            print(f"{name:28}", row)
        told = hallucinations(model, world)
        print(told["answers"])
        for name, row in told["AUROC"].items():
            print(
                f"{name:42}", "  ".join(f"{group.removeprefix('true: ')} {value:.2f}" for group, value in row.items())
            )
        print(told["image share"], told[f"share below {FLAG}"])
        proved = {kind: proofs(model, some) for kind, some in asked.items()}
        print(proved)
        times = speed(model, asked["colour"][0])
        print(times)
    figures = {
        "pointing by kind of question": found,
        "pointing": {"read directly": direct} | pooled,
        "hallucinations": told,
        "proof": proved,
        "time in bare forward passes": times,
    }
    path = keep("image_patches", figures, "specimen scenes, 4 x 4 patches; one thread, a machine with other work")
    print(f"{path.name} in {time.perf_counter() - started:.0f} s")


def _pooled(found: dict[str, Any], kinds: list[str], name: str) -> float:
    total = sum(found[kind]["questions"] for kind in kinds)
    return sum(found[kind]["questions"] * found[kind]["maps"][name]["pointing"] for kind in kinds) / total


if __name__ == "__main__":
    main()
