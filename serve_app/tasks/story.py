"""Tiny stories about a hero, an animal, in a place; told anew with what the user names.

The sentences are fixed, the words are not. The key is the hero, the animal and the place.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from rayseek.serve_app.tasks.asking import chat
from rayseek.serve_app.tasks.example import Answer, Chat, Language, Task
from rayseek.serve_app.tasks.wording import drawn, spoken, with_articles
from rayseek.serve_app.tasks.words import ANIMALS, OBJECTS, name

_PLACES: Mapping[Language, tuple[str, ...]] = {
    "en": (
        *("forest", "village", "mountain", "river", "castle", "desert", "garden", "lake", "city"),
        *("island", "harbour", "farm", "valley", "cave", "meadow", "tower", "school", "market"),
    ),
    "zh": (
        *("森林", "村子", "大山", "河边", "城堡", "沙漠", "花园", "湖边", "城市", "小岛", "农场"),
        *("山谷", "山洞", "草地", "学校", "海边"),
    ),
}
_ASKED: Mapping[Language, tuple[str, ...]] = {
    "en": (
        "(tell|write)( me|) a( short| little| small|) story about a {animal} (named|called) {hero}"
        "( in a {place}|)",
        "(tell|write)( me|) a( short| little|) story about {hero} the {animal}( in a {place}|)",
        "I want (to hear |)a story about a {animal} (named|called) {hero}( in a {place}|)",
        "a story about {hero} the {animal}( and a {thing}|)( in a {place}|), please",
        "(can|could) you tell me a( short|) story about a {animal}( and a {thing}|)",
        "story: {animal}, {place}, {thing}",
    ),
    "zh": (
        "(讲|写|说)一个(关于|)名叫{hero}的{animal}的(小|)故事",
        "(讲|写|说)一个{animal}{hero}在{place}的(小|)故事",
        "我想听(一个|){animal}{hero}的故事",
        "(讲|写)一个(关于|){animal}和{thing}的(小|)故事",
        "故事：{animal}、{place}、{thing}",
    ),
}
_TOLD: Mapping[Language, str] = {
    "en": "Once upon a time there was a {animal} named {hero}, who lived in a {place}. One day "
    "{hero} found a {thing}. A {friend} came by and had lost it. {hero} gave the {thing} back, and "
    "the two became friends.",
    "zh": "从前有一只{animal}，名叫{hero}，住在{place}。有一天，{hero}发现了一个{thing}。"
    "这时来了一只{friend}，原来是它丢的。{hero}把{thing}还给了它，它们成了好朋友。",
}
_SHORTEST = {"en": 12, "zh": 4}  # words; a Chinese text has few spaces


def make(random: Random, language: Language) -> Chat:
    """A wish for a story."""
    animal, friend = random.sample(ANIMALS[language], 2)
    values = {
        "animal": animal,
        "friend": friend,
        "hero": name(random, language),
        "place": random.choice(_PLACES[language]),
        "thing": random.choice(OBJECTS[language]),
    }
    wording = drawn(random, random.choice(_ASKED[language]))
    asked = [value for slot, value in values.items() if f"{{{slot}}}" in wording]

    def judge(answer: Answer) -> bool:
        text = answer.text.lower()
        long_enough = len(text) >= 4 * _SHORTEST[language]
        return not answer.calls and long_enough and all(v.lower() in text for v in asked)

    text = spoken(random, language, wording, ".", polite=0.08).format_map(values)
    return chat(
        random,
        language,
        key="|".join(asked),
        text=with_articles(text),
        answer=with_articles(_TOLD[language].format_map(values)),
        judge=judge,
    )


TASKS = (Task("story", make, weight=2),)
