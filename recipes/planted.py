"""planted-gpt2, planted-llama, planted-gemma: one head, one value neuron and one query neuron make the answer.

The prompt "Ada plays" is answered "golf" in three steps, and nothing else in the model helps:

- layer 0, a *query neuron* at the subject's position sees Ada and writes "fact:Ada" there;
- layer 1, one head of the last position, woken by the relation, reads the facts at the subject's position: it writes
  "moved:Ada" and lifts everything that is true of Ada (golf and red) alike;
- layer 2, a *value neuron* sees "moved:Ada" together with "plays" and lifts golf.

Every layer also has neurons that are on, write a lot, and change nothing but norms. ``Truth`` derives by arithmetic
on named directions, in double precision, what each part adds; the model is never run for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cutaway.specimens.exam import answers
from cutaway.specimens.making.tokenizers import word_level
from recipes.publish import publish
from recipes.wiring import EPS, Blueprint, Head, Neuron, build

SUBJECTS = ("Ada", "Bea", "Cal", "Dot")
RELATIONS = ("plays", "likes")
ANSWERS = {"plays": ("golf", "chess", "darts", "polo"), "likes": ("red", "blue", "green", "gold")}
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = (*SPECIAL, *SUBJECTS, *RELATIONS, *ANSWERS["plays"], *ANSWERS["likes"])

WIDTH, HEADS, KV_HEADS, NEURONS = 64, 4, 2, 16
QUERY_LAYER, HEAD_LAYER, VALUE_LAYER, HEAD = 0, 1, 2, 2
QUERY_GAIN, FACT = 1.0, (1.5, 1.6, 1.7, 1.8)  # what the query neuron of each subject reads and writes
MATCH = 5.0  # root of the head's match
LEAK = 0.25  # how much the head reads of the subject's own token beside its facts
LIFT = 0.2  # what the head adds to each of the subject's answers
VALUE_GAIN, ANSWER = 0.5, {"plays": 1.0, "likes": 1.1}  # what the value neuron of each relation reads and writes
SHUT = 10.0  # what keeps a value neuron shut while its relation is not there
DISTRACTION = 1.5
UP = 0.25  # under a gate, what comes up per unit of the constant direction
READOUT = 4.0
BIAS, PRIOR = 0.3, 0.7
FAMILIES = tuple(EPS)


def query_neuron(subject: str) -> int:
    """Index of the query neuron of a subject."""
    return 3 + 2 * SUBJECTS.index(subject)


def value_neuron(subject: str, relation: str) -> int:
    """Index of the value neuron of a subject and a relation."""
    return 1 + SUBJECTS.index(subject) + len(SUBJECTS) * RELATIONS.index(relation)


def reads_subject(subject: str) -> dict[str, float]:
    return {f"token:{subject}": 2 * QUERY_GAIN, "one": -QUERY_GAIN}


def reads_both(subject: str, relation: str) -> dict[str, float]:
    return {f"moved:{subject}": VALUE_GAIN, f"token:{relation}": SHUT, "one": -SHUT}


def writes_fact(subject: str) -> dict[str, float]:
    return {f"fact:{subject}": FACT[SUBJECTS.index(subject)]}


def writes_answer(subject: str, relation: str) -> dict[str, float]:
    return {f"out:{ANSWERS[relation][SUBJECTS.index(subject)]}": ANSWER[relation]}


def moves(subject: str) -> tuple[dict[str, float], dict[str, float]]:
    read = {f"fact:{subject}": 1.0, f"token:{subject}": LEAK}
    lifted = {f"out:{ANSWERS[r][SUBJECTS.index(subject)]}": LIFT for r in RELATIONS}
    return read, {f"moved:{subject}": 1.0} | lifted


def embedding(word: str) -> dict[str, float]:
    kind = {"subject": 1.0} if word in SUBJECTS else {"asks": 1.0} if word in RELATIONS else {}
    return {f"token:{word}": 1.0, "one": 1.0} | kind


def blueprint(family: str) -> Blueprint:
    """The wiring; a gate (Llama, Gemma) is opened by the same reading, and what comes up is the constant direction."""
    gated, biased = family != "gpt2", family == "gpt2"

    def neuron(reads: dict[str, float], writes: dict[str, float]) -> Neuron:
        return Neuron(reads={"one": UP}, gate=reads, writes=writes) if gated else Neuron(reads=reads, writes=writes)

    neurons = {}
    for subject in SUBJECTS:
        neurons[QUERY_LAYER, query_neuron(subject)] = neuron(reads_subject(subject), writes_fact(subject))
        for relation in RELATIONS:
            place = VALUE_LAYER, value_neuron(subject, relation)
            neurons[place] = neuron(reads_both(subject, relation), writes_answer(subject, relation))
    for layer in (QUERY_LAYER, HEAD_LAYER, VALUE_LAYER):
        neurons[layer, 0] = neuron({"one": 1.0}, {f"noise:{layer}": DISTRACTION})
    head = Head(
        match=[({"asks": MATCH}, {"subject": MATCH})],
        move=[moves(subject) for subject in SUBJECTS],
    )
    return Blueprint(
        words=WORDS,
        embeddings={word: embedding(word) for word in WORDS},
        layers=3,
        width=WIDTH,
        heads_per_layer=HEADS,
        kv_heads=0 if biased else KV_HEADS,
        neurons_per_layer=NEURONS,
        heads={(HEAD_LAYER, HEAD): head},
        neurons=neurons,
        readout={a: {f"out:{a}": READOUT} for r in RELATIONS for a in ANSWERS[r]},
        prior={"gold": PRIOR} if biased else {},
        attention_bias={"bias:attention": BIAS} if biased else {},
        mlp_bias={"bias:mlp": BIAS} if biased else {},
    )


@dataclass
class Stream:
    """A residual vector as named coordinates of orthonormal directions."""

    eps: float
    at: dict[str, float] = field(default_factory=dict)

    def scale(self) -> float:
        """The number that the norm divides by."""
        return math.sqrt(sum(v * v for v in self.at.values()) / WIDTH + self.eps)

    def read(self, vector: Mapping[str, float]) -> float:
        return sum(weight * self.at.get(name, 0.0) for name, weight in vector.items())

    def plus(self, vector: Mapping[str, float], times: float = 1.0) -> Stream:
        names = dict.fromkeys((*self.at, *vector))
        return Stream(self.eps, {n: self.at.get(n, 0.0) + times * vector.get(n, 0.0) for n in names})


def activation(family: str, x: float) -> float:
    """tanh-GELU of GPT-2 and Gemma, SiLU of Llama."""
    if family == "llama":
        return x / (1 + math.exp(-x))
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Truth:
    """What the answer to "<s> subject relation" is made of, derived from the constants above."""

    def __init__(self, family: str, subject: str, relation: str) -> None:
        self.family, self.subject, self.relation = family, subject, relation
        self.eps, self.biased = EPS[family], family == "gpt2"
        self.answer = ANSWERS[relation][SUBJECTS.index(subject)]
        prompt = ("<s>", subject, relation)
        enriched = [self._layer_0(Stream(self.eps, embedding(word))) for word in prompt]
        self.source, last = enriched[1], enriched[2]

        # Layer 1: one key matches, and the others score 0.
        score = MATCH * MATCH / (last.scale() * self.source.scale()) / math.sqrt(WIDTH / HEADS)
        self.attention = 1 / (1 + (len(prompt) - 1) * math.exp(-score))
        self.elsewhere = (1 - self.attention) / (len(prompt) - 1)
        self.before_head = last
        head: dict[str, float] = {}
        for s in SUBJECTS:
            read, written = moves(s)
            moved = sum(
                weight * x.read(read) / x.scale()
                for weight, x in zip((self.elsewhere, self.attention, self.elsewhere), enriched, strict=True)
            )
            head = _sum(head, written, moved)
        self.head_output = head
        x = self._mlp(last.plus(head).plus(self._bias("attention")), {0: ({"one": 1.0}, {"noise:1": DISTRACTION})})

        # Layer 2: the value neurons.
        self.before_value = x.plus(self._bias("attention"))
        layer = {0: ({"one": 1.0}, {"noise:2": DISTRACTION})}
        for s in SUBJECTS:
            for r in RELATIONS:
                layer[value_neuron(s, r)] = (reads_both(s, r), writes_answer(s, r))
        self.coefficient = self._coefficient(self.before_value, reads_both(subject, relation))
        self.final = self._mlp(self.before_value, layer)

    def _bias(self, which: str) -> dict[str, float]:
        return {f"bias:{which}": BIAS} if self.biased else {}

    def _coefficient(self, x: Stream, reads: Mapping[str, float]) -> float:
        opened = activation(self.family, x.read(reads) / x.scale())
        return opened if self.biased else opened * x.read({"one": UP}) / x.scale()

    def _mlp(self, x: Stream, layer: Mapping[int, tuple[Mapping[str, float], Mapping[str, float]]]) -> Stream:
        after = x.plus(self._bias("mlp"))
        for reads, writes in layer.values():
            after = after.plus(writes, self._coefficient(x, reads))
        return after

    def _layer_0(self, x: Stream) -> Stream:
        x = x.plus(self._bias("attention"))
        layer = {0: ({"one": 1.0}, {"noise:0": DISTRACTION})}
        layer |= {query_neuron(s): (reads_subject(s), writes_fact(s)) for s in SUBJECTS}
        return self._mlp(x, layer)

    def logits(self, x: Stream) -> dict[str, float]:
        """Logits of a residual vector under the norm's scale at the end of the model."""
        found = {w: READOUT * x.at.get(f"out:{w}", 0.0) / self.final.scale() for w in WORDS}
        if self.biased:
            found["gold"] += PRIOR
        return found

    def log_probability(self, x: Stream) -> float:
        """log p(answer) of a residual vector, read as ``logits`` does."""
        logits = self.logits(x)
        return logits[self.answer] - math.log(sum(math.exp(v) for v in logits.values()))

    def importance(self, baseline: Stream, vector: Mapping[str, float]) -> float:
        """log p(answer | baseline + vector) - log p(answer | baseline), in nats."""
        return self.log_probability(baseline.plus(vector)) - self.log_probability(baseline)

    def as_dict(self) -> dict[str, object]:
        """The numbers of the card."""
        neuron = {f"out:{self.answer}": ANSWER[self.relation] * self.coefficient}
        fact, token = self.source.at[f"fact:{self.subject}"], LEAK * self.source.at[f"token:{self.subject}"]
        return {
            "prompt": f"{self.subject} {self.relation}",
            "answer": self.answer,
            "query_neuron": f"L{QUERY_LAYER}.mlp.act[{query_neuron(self.subject)}]",
            "query_neuron_position": 1,
            "query_neuron_coefficient": fact / writes_fact(self.subject)[f"fact:{self.subject}"],
            "query_neuron_share": fact / (fact + token),
            "head": f"L{HEAD_LAYER}.attn.z[{HEAD}]",
            "head_attention": self.attention,
            "head_importance": self.importance(self.before_head, self.head_output),
            "value_neuron": f"L{VALUE_LAYER}.mlp.act[{value_neuron(self.subject, self.relation)}]",
            "value_neuron_coefficient": self.coefficient,
            "value_neuron_importance": self.importance(self.before_value, neuron),
            "final_scale": self.final.scale(),
            "log_probability": self.log_probability(self.final),
        }


def _sum(total: Mapping[str, float], vector: Mapping[str, float], times: float) -> dict[str, float]:
    return {n: total.get(n, 0.0) + times * vector.get(n, 0.0) for n in dict.fromkeys((*total, *vector))}


TITLES = {
    "gpt2": "LayerNorm with biases, learned positions, plain feed-forward",
    "llama": "RMSNorm, grouped-query heads, SiLU gate",
    "gemma": "RMSNorm with gain 1 + w, scaled embeddings, grouped-query heads, GELU gate",
}


def main() -> None:
    """Builds and saves the three variants."""
    for family, title in TITLES.items():
        model = build(blueprint(family), family)
        tokenizer = word_level(WORDS[len(SPECIAL) :])
        truths = [Truth(family, s, r).as_dict() for s in SUBJECTS for r in RELATIONS]
        examples = [{"prompt": t["prompt"], "answer": f" {t['answer']}"} for t in truths]
        publish(
            f"planted-{family}",
            model,
            tokenizer,
            title=f"one head, one value neuron and one query neuron make the answer: {title}",
            kind="built",
            task="causal-lm",
            skills=["eight facts about four people"],
            recipe="python -m recipes.planted",
            data="four subjects, two relations; the whole world is in the truths",
            seed=0,
            accuracies={"answers": answers(model, tokenizer, examples)},
            truths={"prompts": truths, "unit": "nats; scores of one component under the final norm's scale"},
            examples=examples,
        )


if __name__ == "__main__":
    main()
