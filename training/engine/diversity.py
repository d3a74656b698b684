"""Numbers about a set of answers: length, diversity, repetition, refusals. Pure; knows no model.

An answer is its token ids without the token that ends it, so that no language's words must be known. Where
there is nothing to count the value is None.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

Ids = Sequence[int]
BLEU_ORDER = 4
REPETITION_ORDER = 4
# A refusal says so in its first sentences; what comes later may be a caution inside an answer.
REFUSAL_CHARACTERS = 160


def ngrams(ids: Ids, order: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + order]) for start in range(len(ids) - order + 1)]


def mean_length(answers: Sequence[Ids]) -> float | None:
    return sum(len(ids) for ids in answers) / len(answers) if answers else None


def distinct(answers: Sequence[Ids], order: int) -> float | None:
    """distinct-n: different n-grams of all answers / all their n-grams (Li et al. 2016, arXiv 1510.03055)."""
    found = [gram for ids in answers for gram in ngrams(ids, order)]
    return len(set(found)) / len(found) if found else None


def repetition(answers: Sequence[Ids]) -> float | None:
    """seq-rep-4: the share of an answer's 4-grams that are not new in it, mean over answers that have any.

    Welleck et al. 2019, arXiv 1908.04319.
    """
    shares = []
    for ids in answers:
        found = ngrams(ids, REPETITION_ORDER)
        if found:
            shares.append(1 - len(set(found)) / len(found))
    return sum(shares) / len(shares) if shares else None


def self_bleu(answers: Sequence[Ids]) -> float | None:
    """Mean BLEU-4 of each answer against all others: near 1, all prompts get one answer (arXiv 1802.01886)."""
    spoken = [ids for ids in answers if len(ids)]
    if len(spoken) < 2:
        return None
    scores = [bleu(ids, [*spoken[:index], *spoken[index + 1 :]]) for index, ids in enumerate(spoken)]
    return sum(scores) / len(scores)


def bleu(answer: Ids, references: Sequence[Ids]) -> float:
    """Papineni et al. 2002, orders 1 to 4, those above 1 with one added to both counts (Lin and Och 2004)."""
    orders = range(1, min(BLEU_ORDER, len(answer)) + 1)
    total = 0.0
    for order in orders:
        mine = Counter(ngrams(answer, order))
        most: Counter[tuple[int, ...]] = Counter()
        for reference in references:
            most |= Counter(ngrams(reference, order))
        matched, all_of_them = sum((mine & most).values()), sum(mine.values())
        extra = 0 if order == 1 else 1
        if matched + extra == 0:
            return 0.0
        total += math.log((matched + extra) / (all_of_them + extra))
    closest = min((abs(len(reference) - len(answer)), len(reference)) for reference in references)[1]
    brevity = min(0.0, 1 - closest / len(answer))
    return math.exp(brevity + total / len(orders))


# How assistants refuse, in the languages of most data sets. Words, not a judgement: a rule that can be read.
REFUSALS = (
    r"\bi(?:'m| am) (?:really |very |so )?(?:sorry|unable|not able|afraid)\b",
    r"\bi (?:can't|cannot|can not|won't|will not|must decline|am not going to)\b",
    r"\bas an ai(?: language model| assistant)?\b",
    r"\bmy apologies\b|\bi apologi[sz]e\b",
    r"\bes tut mir leid\b|\bich kann (?:dir |ihnen )?(?:dabei |damit )?(?:leider )?nicht\b",
    r"\bje suis désolée?\b|\bje ne peux pas\b|\bje ne suis pas en mesure\b",
    r"\blo siento\b|\bno puedo (?:ayudar|hacer|proporcionar|responder|cumplir)\w*\b",
    r"\bmi dispiace\b|\bnon posso (?:aiutar|rispond|fornir)\w*\b",
    r"\bsinto muito\b|\bdesculpe\b|\bnão posso (?:ajudar|responder|fornecer)\w*\b",
    r"извините|к сожалению, я|я не могу (?:помочь|ответить|предоставить)",
    r"对不起|抱歉|很遗憾|我(?:不能|无法)|作为(?:一个|一名)?(?:ai|人工智能)",
    r"申し訳(?:ありません|ございません)|できません|お答えできません",
    r"죄송(?:합니다|하지만)|할 수 없습니다",
    r"عذرا|آسف|لا أستطيع",
    r"क्षमा करें|माफ़ करें",
)
_REFUSAL = re.compile("|".join(REFUSALS))


def is_refusal(text: str) -> bool:
    """Whether one of `REFUSALS` is in the first 160 characters, whatever the case and the apostrophe."""
    start = unicodedata.normalize("NFC", text).strip()[:REFUSAL_CHARACTERS]
    return _REFUSAL.search(start.casefold().replace("\u2019", "'")) is not None


def refusal_share(texts: Sequence[str]) -> float | None:
    return sum(is_refusal(text) for text in texts) / len(texts) if texts else None
