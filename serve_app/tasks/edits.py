"""Small changes to a text that is given: case, order, a word replaced, removed or repeated,
initials, words joined or split.

The words come from short lists in ever new company: the key is the change and the words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from random import Random

from rayseek.serve_app.tasks.asking import chat, phrase
from rayseek.serve_app.tasks.example import Chat, Language, Task
from rayseek.serve_app.tasks.judging import says_text
from rayseek.serve_app.tasks.words import ANIMALS, CITIES, COLOURS, FOODS, NAMES, OBJECTS, invented

Wordings = Mapping[Language, tuple[str, ...]]
_UPPER: Wordings = {
    "en": (
        "(write|put|convert|turn) (this|the text|the words|) (in|to|into) (upper case|uppercase|"
        "capital letters|capitals|all caps): {text}",
        '(write|convert) "{text}" (in|to) (upper case|uppercase|capital letters).',
        "(make this|make|turn this) (upper case|uppercase): {text}",
        "uppercase: {text}",
    ),
    "zh": ("(把|将)“{text}”(改成|变成|转换成)大写。", "(转换成|改成|写成)大写：{text}"),
}
_LOWER: Wordings = {
    "en": (
        "(write|put|convert|turn) (this|the text|the words|) (in|to|into) (lower case|lowercase|"
        "small letters): {text}",
        '(write|convert) "{text}" (in|to) (lower case|lowercase|small letters).',
        "(make this|make|turn this) (lower case|lowercase): {text}",
        "lowercase: {text}",
    ),
    "zh": ("(把|将)“{text}”(改成|变成|转换成)小写。", "(转换成|改成|写成)小写：{text}"),
}
_FIRST_LETTER: Wordings = {
    "en": (
        '(what is|what\'s|give me|tell me) the first letter of (the word |)"{text}"?',
        "(what is|what's) the first letter of {text}?",
        "{text} (starts|begins) with which letter?",
    ),
    "zh": ("“{text}”的第一个字母是什么？", "{text}的首字母是什么？"),
}
_FIRST_LETTER_ZH = ("“{text}”的第一个字是什么？", "{text}的第一个字是哪个？")
_LAST_WORD: Wordings = {
    "en": (
        '(what is|what\'s|give me|tell me) the last word (of|in) "{text}"?',
        "what is the last word (of|in)(:| this:| the sentence:) {text}",
        "last word of: {text}",
    ),
    "zh": ("“{text}”的最后一个词是什么？", "最后一个词是什么：{text}"),
}
_FIRST_WORD: Wordings = {
    "en": (
        '(what is|what\'s|give me|tell me) the first word (of|in) "{text}"?',
        "what is the first word (of|in)(:| this:| the sentence:) {text}",
        "first word of: {text}",
    ),
    "zh": ("“{text}”的第一个词是什么？", "第一个词是什么：{text}"),
}
_REVERSE: Wordings = {
    "en": (
        "(reverse the word order|reverse the order of the words|reverse the words|put the words "
        "in reverse order)(:| of:) {text}",
        "(reverse the word order|reverse the order of the words|reverse the words) (of|in) "
        '"{text}".',
        "(write|say) the words backwards: {text}",
    ),
    "zh": ("(把词的顺序倒过来|词语倒序|把词反过来排)：{text}", "把“{text}”的词序倒过来。"),
}
_REPLACE: Wordings = {
    "en": (
        '(replace|change|substitute) "{old}" (with|to|by) "{new}"(:| in:) {text}',
        "(replace|swap) {old} (with|by) {new} in (this|the sentence|the text)(:|) {text}",
        "replace the word {old} with {new}: {text}",
        'in "{text}", (replace|change) {old} (with|to) {new}.',
    ),
    "zh": (
        "(把|将)“{text}”(中的|里的){old}(换成|改成|替换成){new}。",
        "(把|将){old}(换成|改成|替换成|替换为){new}：{text}",
    ),
}
_REMOVE: Wordings = {
    "en": (
        '(remove|delete|drop) "{old}" from(:| this:) {text}',
        "(remove|delete) the word {old} (from|in)(:| this:| the text:) {text}",
        '(remove|delete|drop) {old} from "{text}".',
    ),
    "zh": ("(把|将)“{text}”(中的|里的){old}(去掉|删掉|删除)。", "(去掉|删掉|删除){old}：{text}"),
}
_REPEAT: Wordings = {
    "en": (
        "(repeat|say|write) (the word|) {text} {n} times.",
        '(repeat|say|write) "{text}" {n} times.',
        "{n} times {text}",
        "write {n} times: {text}",
    ),
    "zh": ("(把|将)“{text}”(重复|写|说){n}(次|遍)。", "(重复|写){n}(次|遍)：{text}"),
}
_JOIN: Wordings = {
    "en": (
        "(join|connect) (these words|the words|this|) with (commas|a comma): {text}",
        "(put commas between|separate by commas)(:| these words:) {text}",
        "make a comma-separated list: {text}",
    ),
    "zh": ("用逗号(连接|隔开)(这些词|)：{text}", "(把|将)“{text}”用逗号(隔开|连接)。"),
}
_ACRONYM: Wordings = {
    "en": (
        "(what is the acronym of|what are the initials of|what is the abbreviation of) {text}?",
        "(make|build|form) (an acronym|the acronym|initials) (of|from|for)(:|) {text}",
        "acronym (of|for) {text}?",
    ),
    "zh": ("{text}的首字母缩写是什么？", "(写出|给出)首字母缩写：{text}"),
}
_SAY: Wordings = {
    "en": (
        "(say|repeat|write|echo)(:| this:| after me:) {text}",
        '(say|repeat|write|echo) "{text}".',
        "repeat exactly: {text}",
    ),
    "zh": ("(说|重复|跟我说|重复一遍|写)：{text}", "(说|重复|写)“{text}”。"),
}
_TITLE: Wordings = {
    "en": (
        "(capitalize|capitalise) (each word|every word|the words)(:| in:| of:) {text}",
        "(write|put) (this|) in title case: {text}",
    ),
    "zh": ("(把|将)“{text}”每个单词的首字母大写。", "每个单词首字母大写：{text}"),
}
_SPELL: Wordings = {
    "en": ("spell {text}.", "(how do you|can you) spell {text}?", "spell the word {text}."),
    "zh": ("拼写{text}。", "{text}怎么拼写？", "{text}怎么拼？"),
}


def _words(language: Language) -> tuple[str, ...]:
    tables = (OBJECTS, ANIMALS, COLOURS, FOODS)
    return tuple(sorted({w for table in tables for w in table[language] if w.isalpha()}))


_GREETINGS = ("hello", "world", "good", "morning", "friend", "day")
_VOCABULARY = {"en": (*_words("en"), *_GREETINGS), "zh": _words("zh")}
_VERBS = ("sees", "likes", "has", "wants", "finds", "buys", "sold", "took", "lost", "found")
_CAPITALS = tuple(word for word in (*NAMES["en"], *CITIES["en"]) if word.isalpha())


def _some(random: Random, language: Language, low: int, high: int) -> list[str]:
    """A few words, one of them sometimes invented."""
    words = random.sample(_VOCABULARY[language], random.randint(low, high))
    if language == "en" and random.random() < 0.1:
        words[-1] = invented(random)
    return words


def _sentence(random: Random, language: Language) -> tuple[str, str]:
    """A short sentence, and one of its words to work with."""
    who, what = random.choice(ANIMALS[language]), random.choice(OBJECTS[language])
    colour = random.choice(COLOURS[language])
    if language == "zh":
        verb = random.choice(("喜欢", "有一个", "看见", "想要", "买了"))
        return f"{random.choice(NAMES['zh'])}{verb}{colour}的{what}。", random.choice(
            (colour, what)
        )
    verb, end = random.choice(_VERBS), "." if random.random() < 0.6 else ""
    roll = random.random()
    if roll < 0.4:
        return f"The {who} {verb} the {what}{end}", random.choice((who, what, verb))
    if roll < 0.7:
        return f"The {colour} {what} is on the table{end}", random.choice((colour, what, "table"))
    name = random.choice(NAMES["en"])
    return f"{name} {verb} a {colour} {what}{end}", random.choice((name, verb, colour, what))


Edit = tuple[Wordings, str, str, dict[str, object]]  # wordings, text, right answer, other fields


def _case(random: Random, language: Language) -> Edit:
    text = " ".join(_some(random, "en", 1, 3))
    if random.random() < 0.2:
        text = _sentence(random, "en")[0].lower()
    roll = random.random()
    if roll < 0.5:
        return _UPPER, text, text.upper(), {}
    if roll < 0.75:
        shown = text.upper() if random.random() < 0.6 else text.title()
        return _LOWER, shown, text, {}
    return _TITLE, text, text.title(), {}


def _letters(random: Random, language: Language) -> Edit:
    if random.random() < 0.25:
        word = random.choice(_VOCABULARY["en"])
        which = random.randrange(len(_SPELL[language]))  # a fact: the wording is in the key
        return {language: (_SPELL[language][which],)}, word, "-".join(word), {"wording": which}
    if random.random() < 0.5:
        word = random.choice(_VOCABULARY["en" if random.random() < 0.7 else language])
        if not word.isascii():
            return {"en": (), "zh": _FIRST_LETTER_ZH}, word, word[0], {}
        return _FIRST_LETTER, word, word[0], {}
    words = [random.choice((*_CAPITALS, *map(str.title, _some(random, "en", 1, 1))))
             for _ in range(random.randint(2, 4))]  # fmt: skip
    return _ACRONYM, " ".join(words), "".join(word[0] for word in words), {}


def _order(random: Random, language: Language) -> Edit:
    words = _some(random, language, 2, 5)
    text = " ".join(words)
    roll = random.random()
    if roll < 0.25:
        return _LAST_WORD, text, words[-1], {}
    if roll < 0.4:
        return _FIRST_WORD, text, words[0], {}
    if roll < 0.75:
        return _REVERSE, text, " ".join(reversed(words)), {}
    return _JOIN, text, ", ".join(words), {}


def _change(random: Random, language: Language) -> Edit:
    if random.random() < 0.4:
        text, old = _sentence(random, language)
        tables = (ANIMALS[language], OBJECTS[language], COLOURS[language], _VERBS)
        alike = next((table for table in tables if old in table), NAMES[language])
        new = random.choice(alike)
        edge = r"\b" if language == "en" else ""
        right = re.sub(f"{edge}{re.escape(old)}{edge}", new, text)
        return _REPLACE, text, right, {"old": old, "new": new}
    words = _some(random, language, 3, 5)
    text = " ".join(words)
    at = random.randrange(len(words))
    old = words[at]
    if random.random() < 0.4:
        del words[at]
        return _REMOVE, text, " ".join(words), {"old": old}
    new = random.choice(_VOCABULARY[language])
    words[at] = new
    return _REPLACE, text, " ".join(words), {"old": old, "new": new}


def _copy(random: Random, language: Language) -> Edit:
    if random.random() < 0.5:
        text = " ".join(_some(random, language, 2, 5))
        if random.random() < 0.4:
            text = _sentence(random, language)[0]
        return _SAY, text, text, {}
    word, n = _some(random, language, 1, 1)[0], random.randint(2, 6)
    return _REPEAT, word, " ".join([word] * n), {"n": n}


_EDITS: tuple[Callable[[Random, Language], Edit], ...]
_EDITS = (_case, _letters, _order, _order, _change, _change, _copy)


def _edit(random: Random, language: Language) -> Chat:
    wordings, text, right, fields = random.choice(_EDITS)(random, language)
    others = " ".join(map(str, fields.values()))
    return chat(
        random,
        language,
        key=f"{text.lower()}|{right.lower()}|{others}",
        text=phrase(random, language, wordings[language], text=text, **fields),
        answer=right,
        judge=says_text(right),
    )


TASKS = (Task("edits", _edit, 8),)
