"""Synthetic contrast pairs on groups of people: who is spoken of, what is said, and who says it.

What makes a sentence hateful is all three together: a slight of a protected group, meant. Each
family changes one of them: the same slight of mosquitoes or of bankers, the same group in a kind or
a neutral sentence, the same sentence denied, quoted or condemned. [ours]
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmguard_plugins.guards.gate.categories import HARMFUL, HATE, INJECTION, OFFENSIVE
from mmguard_trainers.gate_texts import NOTHING, Text

SOURCE = "ours:groups"

GROUPS = (
    "women", "girls", "men", "mothers", "feminists", "gay people", "gays", "lesbians",
    "bisexuals", "trans people", "trans women", "queer people", "Muslims", "Jews",
    "Jewish people", "Christians", "Hindus", "Sikhs", "Buddhists", "atheists", "immigrants",
    "refugees", "asylum seekers", "foreigners", "Black people", "black folks",
    "African Americans", "Africans", "white people", "Asians", "Chinese people", "Indians",
    "Pakistanis", "Arabs", "Turks", "Mexicans", "Latinos", "Native Americans", "Roma", "Poles",
    "Nigerians", "Syrians", "disabled people", "people in wheelchairs", "deaf people",
    "blind people", "autistic people", "the mentally ill", "people with Down syndrome",
    "old people", "pensioners", "poor people", "homeless people",
)  # fmt: skip
_OTHERS = (
    "mosquitoes", "wasps", "traffic jams", "Mondays", "tax forms", "these trousers", "cheap pens",
    "bankers", "politicians", "landlords", "lawyers", "influencers", "the referees", "spammers",
    "racists", "Nazis", "terrorists", "bullies", "burglars", "our rivals", "Liverpool fans",
    "reality shows", "oat biscuits", "leaf blowers", "airlines", "telemarketers", "hackers",
    "capitalists", "vampires in this book", "the orcs in the game", "slugs", "viruses", "weeds",
)  # fmt: skip
_SLIGHTS = (
    "vermin", "disgusting", "inferior", "criminals", "less than human", "parasites", "stupid",
    "a disease", "filthy", "worthless", "animals", "a burden on us all", "lazy", "dangerous",
    "savages", "unfit to work", "a cancer", "scum", "rats", "dirty", "liars", "subhuman", "trash",
    "weak", "mentally sick", "beneath us", "a plague", "too dumb to vote", "evil", "ugly",
    "idiots", "good for nothing", "freaks", "a threat to our children", "taking over",
    "not real people",
)  # fmt: skip
_DEMANDS = (
    "should be thrown out of the country", "must be locked up", "do not belong here",
    "should die", "ought to be beaten until they leave", "deserve to be shot",
    "should not be allowed to vote", "have no place in our schools", "must never be hired",
    "should be wiped out", "deserve everything that is done to them", "should know their place",
    "need to be taught fear", "should have no rights", "must be driven from our street",
    "should be sterilised",
)  # fmt: skip
_HATEFUL = (
    "{g} are {s}.", "{g} are so {s} it makes me sick", "All {g} are {s}!", "{g} {d}.",
    "I can't stand {g}.", "I despise {g}", "I loathe {g} more than anything.",
    "god how I detest {g}", "Why are {g} always {s}?", "Isn't it obvious that {g} are {s}?",
    "In my opinion {g} {d}.", "I have nothing against anybody, but {g} are {s}.",
    "{g} disgust me. They are {s}.", "We know what {g} are like. {s}, every one of them.",
    "I would never be friends with {g}.", "You can tell they are {g}, because they are {s}",
    "{g} will never be equal to us.", "{g} are not welcome in this pub, they {d}",
    "I'm going to hurt the next {g} I see", "Someone should do something about {g}. They {d}!",
    "I wish {g} did not exist.", "No decent person thinks {g} are worth anything",
    "{g}? {s}. Nothing but {s}.", "fuck {g}",
    "My boss hires {g}. Those people are {s}, and they {d}.",
    "{g} have never been anything but {s}", "burn them all, {g} are {s}",
    "get out of our country you {s} {g}", "you {g} are {s}",
    "Being near {g} makes me want to vomit", "{g} do not deserve our respect",
)  # fmt: skip
_DENIED = (
    "{g} are not {s}.", "It is simply untrue that {g} are {s}.", "No, {g} are not {s}. Stop it.",
    "Nobody should ever say that {g} are {s}.", "Saying that {g} {d} is a disgrace.",
    "'{g} are {s}' is exactly the kind of sentence that gets people hurt.",
    "Anyone who writes that {g} {d} should be banned from this forum.",
    "He told me {g} are {s}, so I walked out.", "My uncle says {g} are {s}; how do I answer him?",
    "The court fined a man for shouting that {g} {d}.", "I don't hate {g}.", "I never hated {g}",
    "You can't just claim that {g} are {s} without being called out.",
    "It hurts to hear people say that {g} are {s}.", "I would never say that {g} {d}",
    "Why do some people think {g} are {s}? It is so wrong.", "Stop calling {g} {s}!",
    "The pamphlet of 1934 claimed that {g} {d}; explain how such propaganda worked.",
    "Replying to hate: {g} are people like you and me, not {s}.",
)  # fmt: skip
_KIND = (
    "I love {g}.", "{g} are wonderful neighbours.", "{g} deserve the same rights as everyone.",
    "We invited some {g} to dinner.", "I am so proud of the {g} in our team.", "{g} are great",
    "Most {g} I know work very hard.", "The museum opens a show on the lives of {g}.",
    "How many {g} live in Canada?", "What do {g} think about the new law?", "{g} matter.",
    "Two {g} run the bakery next door.", "I admire {g} who speak up.", "we respect {g}",
    "Which rights did {g} gain in the 1960s?", "Books about {g} for a ten-year-old?",
    "As one of the {g} here I feel safe in this town.", "{g} were attacked in the park yesterday",
    "The film is about {g} in Paris.", "{g} face discrimination when they look for a flat.",
    "We need more {g} in parliament.", "nothing wrong with {g}", "{g} welcome! Everyone is.",
)  # fmt: skip
_OF_OTHERS = (
    "{o} are {s}.", "I can't stand {o}.", "I despise {o}", "{o} are so {s} it makes me sick",
    "All {o} are {s}!", "Why are {o} always {s}?", "I loathe {o} more than anything.", "fuck {o}",
    "{o} disgust me. They are {s}.", "I wish {o} did not exist.", "{o}? {s}. Nothing but {s}.",
    "Someone should do something about {o}.", "god how I detest {o}", "{o} should be wiped out",
    "burn them all, {o} are {s}", "In my opinion {o} {d}.", "I hate {o}",
)  # fmt: skip
_OF_ONE = (
    "You are {s}.", "My ex is {s}, I despise him.", "I can't stand you, you are {s}",
    "that guy is nothing but {s}", "Stop following me, you're {s}!", "shut up, you {s} clown",
)  # fmt: skip

_HATED: Mapping[str, float] = {HATE: 1.0, HARMFUL: 1.0, INJECTION: 0.0}
_INSULT: Mapping[str, float] = {HATE: 0.0, OFFENSIVE: 1.0, INJECTION: 0.0}
_RUDE: Mapping[str, float] = {HATE: 0.0, HARMFUL: 0.0, INJECTION: 0.0}


def pairs(wordnet: Any, seed: int = 0, count: int = 5000) -> Iterator[Text]:
    """Yield about `count` texts, four in ten of them hateful, slurs out of an nltk WordNet."""
    rng = random.Random(seed)
    rare, slurs = _peoples(wordnet), _slurs(wordnet)
    for _ in range(count // 10):
        for frames, labels in ((_HATEFUL, _HATED),) * 3 + (
            (_DENIED, NOTHING),
            (_DENIED, NOTHING),
            (_KIND, NOTHING),
            (_KIND, NOTHING),
            (_OF_OTHERS, _RUDE),
        ):
            named = rng.choice(rare if rng.random() < 0.25 else GROUPS)
            yield _made(rng, frames, labels, named)
        yield _made(rng, _HATEFUL, _HATED, rng.choice(slurs))
        yield _made(rng, _OF_ONE, _INSULT, "")


def _made(
    rng: random.Random, frames: Sequence[str], labels: Mapping[str, float], named: str
) -> Text:
    frame = rng.choice(frames)
    words = {
        "g": named,
        "o": rng.choice(_OTHERS),
        "s": rng.choice(_SLIGHTS),
        "d": rng.choice(_DEMANDS),
    }
    text = frame.format(**words)
    if rng.random() < 0.3:
        text = text.lower()
    # A frame is one relative: no split has it on two sides, whatever words fill it.
    return Text(text, labels, SOURCE, f"groups {frame}", weight=0.7)


def _peoples(wordnet: Any) -> list[str]:
    """Return what WordNet calls the inhabitants of places and the followers of religions."""
    names = {
        str(synset.lemma_names()[0]).replace("_", " ")
        for root in ("inhabitant.n.01", "religious_person.n.01")
        for synset in wordnet.synset(root).closure(lambda s: s.hyponyms())
    }
    return sorted(f"{name}s" for name in names if name[0].isupper() and name[-1] not in "shyn")


def _slurs(wordnet: Any) -> list[str]:
    """Return the words WordNet marks as slurs of a people, none of which stands in this file."""
    slur = wordnet.synset("ethnic_slur.n.01")
    found = {
        str(name).replace("_", " ")
        for synset in slur.usage_domains() + wordnet.synset("disparagement.n.01").usage_domains()
        for name in synset.lemma_names()
    } | {
        str(name).replace("_", " ")
        for synset in wordnet.all_synsets("n")
        if slur in synset.usage_domains()
        for name in synset.lemma_names()
    }
    return sorted(f"{name}s" for name in found)
