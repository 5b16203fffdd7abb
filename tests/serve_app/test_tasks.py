"""The small model's questions: their answers are right, held-out ones stay out, judges judge."""

import ast
import calendar
import json
import re
from datetime import date, timedelta
from random import Random

import pytest

from rayseek.serve_app.tasks import arithmetic, dates, fim, functions, judging, running
from rayseek.serve_app.tasks.catalogue import CATALOGUE, task, weighted
from rayseek.serve_app.tasks.example import (
    Answer,
    Call,
    Chat,
    Example,
    Fill,
    Language,
    Task,
    draw,
    is_held_out,
    questions,
)

ALL = [
    pytest.param(entry, language, id=f"{entry.name}-{language}")
    for entry in CATALOGUE
    for language in entry.languages
]
LANGUAGES: tuple[Language, ...] = ("en", "zh")


def canonical(example: Example) -> Answer:
    """The answer that is learnt, as an endpoint would give it."""
    if isinstance(example, Fill):
        return Answer(example.middle)
    calls = tuple(Call(c.name, json.loads(c.arguments)) for c in example.answer.tool_calls)
    return Answer(example.answer.content or "", calls)


def drawn(entry: Task, language: Language, count: int, seed: int = 0) -> list[Example]:
    random = Random(seed)
    return [entry.make(random, language) for _ in range(count)]


def chats(name: str, language: Language, count: int = 400) -> list[tuple[str, str, Chat]]:
    """Question, answer and the example itself of a task that only chats."""
    made = [e for e in drawn(task(name), language, count) if isinstance(e, Chat)]
    return [(e.messages[-1].content or "", e.answer.content or "", e) for e in made]


@pytest.mark.parametrize("entry, language", ALL)
def test_the_learnt_answer_is_judged_right(entry: Task, language: Language) -> None:
    for example in drawn(entry, language, 500):
        assert example.judge(canonical(example)), example


@pytest.mark.parametrize("entry, language", ALL)
def test_another_answer_is_mostly_judged_wrong(entry: Task, language: Language) -> None:
    runs = entry.name in ("fim", "code")  # each judgement runs a program
    made = drawn(entry, language, 12 if runs else 300)
    taken = [one.judge(canonical(other)) for one, other in zip(made, made[1:], strict=False)]
    if entry.name != "decline":  # where any polite refusal is right
        assert sum(taken) / len(taken) < 0.25
    assert not any(example.judge(Answer("")) for example in made)


@pytest.mark.parametrize("entry, language", ALL)
def test_a_seed_gives_the_same_questions(entry: Task, language: Language) -> None:
    def shown(seed: int) -> list[object]:
        return [
            (e.key, e.messages, e.answer) if isinstance(e, Chat) else (e.key, e.prefix, e.middle)
            for e in drawn(entry, language, 50, seed)
        ]

    assert shown(3) == shown(3) != shown(4)


@pytest.mark.parametrize("entry, language", ALL)
def test_held_out_questions_stay_out_of_training(entry: Task, language: Language) -> None:
    random = Random(1)
    trained = {draw(entry, "train", random, language).key for _ in range(500)}
    asked = list(questions(entry, language, 100))
    assert len(asked) == 100
    assert trained.isdisjoint(example.key for example in asked)
    assert all(is_held_out(entry.name, example.key) for example in asked)
    assert all(example.language == language for example in asked)


def test_the_split_is_fixed_and_takes_a_tenth() -> None:
    sums = [f"{a}+{b}" for a in range(100) for b in range(100)]
    held = [key for key in sums if is_held_out("arithmetic", key)]
    assert held[:3] == ["0+14", "0+20", "0+25"]
    assert 0.09 < len(held) / len(sums) < 0.11


@pytest.mark.parametrize("language", LANGUAGES)
def test_examples_in_a_prompt_are_not_held_out_questions(language: Language) -> None:
    shown = 0
    for _, _, example in chats("json", language, 3000):
        system = example.messages[0].content or ""
        if example.messages[0].role == "system" and "\n{\n" in system:
            record = json.loads(system[system.index("\n{\n") :])
            first = "Mount Everest" in system or "珠穆朗玛峰" in system
            assert first or not is_held_out("json", json.dumps(record, sort_keys=True))
            shown += 1
    assert shown > 100


@pytest.mark.parametrize("language", LANGUAGES)
def test_sums_are_right_and_keyed_by_the_sum_alone(language: Language) -> None:
    wordings = set()
    for question, answer, example in chats("arithmetic", language, 2000):
        said, result = answer.split(" = ")
        a, sign, b = said.split(" ")
        value = {"+": int.__add__, "-": int.__sub__, "×": int.__mul__}[sign](int(a), int(b))
        assert int(result) == value
        assert example.key == f"{a}{sign}{b}"
        wordings.add(re.sub(r"\d+", "#", question))
    assert len(wordings) > 200


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_sorted_is_what_was_asked(language: Language) -> None:
    for question, answer, example in chats("sort", language):
        given = re.findall(r"\d+", question)
        if given:
            down = example.key.startswith("down")
            assert answer == ", ".join(sorted(given, key=int, reverse=down))
        else:
            words = answer.split(", ")
            assert words == sorted(words)
            assert all(re.search(rf"\b{word}\b", question, re.ASCII) for word in words)


DAY = "[A-Z][a-z]+day|星期[一二三四五六日]"
SUM = r"(\d+) ([+-]) (\d+)((?: [+-] \d+)?) = (\d+)"


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_counted_is_gone_through_in_order(language: Language) -> None:
    gone_through = 0
    for question, answer, _ in chats("count", language, 500):
        if found := re.fullmatch(r"(.+): (.+?)(?: appears |出现了)(\d+)(?: times?\.|次。)", answer):
            shown = re.split(", |、", found[1])
            items = [re.sub(r" \(\d+\)", "", item) for item in shown]
            numbers = [int(n) for n in re.findall(r" \((\d+)\)", found[1])]
            assert (
                numbers
                == list(range(1, int(found[3]) + 1))
                == list(range(1, items.count(found[2]) + 1))
            )
            spelled = "".join(items) in question
            between = "[^a-z]*(?:and)?[^a-z]*"
            assert spelled or re.search(between.join(map(re.escape, items)), question)
            gone_through += 1
    assert gone_through > 100


@pytest.mark.parametrize("language", LANGUAGES)
def test_weekdays_and_dates_agree_with_the_calendar(language: Language) -> None:
    seen = set()
    for _, answer, example in chats("dates", language, 1500):
        if found := re.fullmatch(r"weekday (\d)([+-]\d+)", example.key):
            day = (int(found[1]) + int(found[2])) % 7
            assert answer.rstrip(".。").endswith(dates.DAYS[language][day])
            steps = [dates.DAYS[language].index(d) for d in re.findall(DAY, answer)][:-2]
            step = -1 if found[2][0] == "-" else 1
            assert steps == [(int(found[1]) + step * (i + 1)) % 7 for i in range(len(steps))]
        elif found := re.fullmatch(r"(\d+-\d+-\d+)([+-]\d+)", example.key):
            later = date.fromisoformat(found[1]) + timedelta(int(found[2]))
            first, sign, second, turned, result = re.findall(SUM, answer)[0]
            assert f"{first}{sign}{second}" == f"{int(found[1][-2:])}{found[2]}"
            assert eval(f"{first}{sign}{second}{turned}") == int(result) == later.day
        elif found := re.fullmatch(r"leap (\d+)", example.key):
            leap = calendar.isleap(int(found[1]))
            assert answer.startswith(("No", "不是") if not leap else ("Yes", "是"))
        elif found := re.fullmatch(r"length of (\S+)\|\d", example.key):
            month = dates.MONTHS[language].index(found[1]) + 1
            assert str(calendar.monthrange(2023, month)[1]) in answer
        seen.add(example.key.split(" ")[0])
    assert {"weekday", "leap", "length"} <= seen


@pytest.mark.parametrize("language", LANGUAGES)
def test_conversions_multiply_right_and_say_no_held_out_product(language: Language) -> None:
    for _, answer, _ in chats("units", language):
        ((n, sign, factor, value),) = re.findall(r"= (\d+) ([×÷]) (\d+) = (\d+)", answer)
        whole, part = (value, n) if sign == "×" else (n, value)
        assert int(part) * int(factor) == int(whole)
        assert sign == "÷" or not is_held_out("arithmetic", f"{n}×{factor}")


@pytest.mark.parametrize("language", LANGUAGES)
def test_json_answers_copy_their_values_from_the_question(language: Language) -> None:
    modes = set()
    for question, answer, example in chats("json", language):
        value = json.loads(answer)
        everything = question + "".join(m.content or "" for m in example.messages)
        for key, held in value.items():
            assert key in everything or key in ("question", "answer")
            for item in held if isinstance(held, list) else [held]:
                assert isinstance(item, bool) or str(item).lower() in question.lower()
        modes.add(example.json_mode)
    assert modes == {True, False}


def test_the_exam_of_the_vendors_guide_is_asked() -> None:
    """https://api-docs.deepseek.com/guides/json_mode, its two messages and its answer."""
    system = (
        'The user will provide some exam text. Please parse the "question" and "answer" and '
        "output them in JSON format. \n\nEXAMPLE INPUT: \nWhich is the highest mountain in the "
        "world? Mount Everest.\n\nEXAMPLE JSON OUTPUT:\n{\n"
        '    "question": "Which is the highest mountain in the world?",\n'
        '    "answer": "Mount Everest"\n}'
    )
    user = "Which is the longest river in the world? The Nile River."
    asked = {tuple(m.content for m in e.messages) for _, _, e in chats("json", "en", 6000)}
    assert any(messages[0] == system for messages in asked)
    assert any(messages[-1] == user for messages in asked)


@pytest.mark.parametrize("kind", functions.KINDS, ids=lambda kind: kind.names[0].template)
def test_every_kind_of_function_runs_whatever_its_names(kind: functions.Kind) -> None:
    random = Random(0)
    for plain in (True, False, False, False):
        function = functions.write(random, "en", kind, plain=plain)
        values = running.evaluate(function.source, function.name, kind.calls)
        assert len(values) == len(kind.calls) > 1
        assert len(set(values)) > 1, "calls that all return the same tell nothing"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_filled_hole_is_a_program(language: Language) -> None:
    cuts = set()
    for example in drawn(fim.TASKS[0], language, 1500):
        assert isinstance(example, Fill)
        source = example.prefix + example.middle + example.suffix
        ast.parse(source)
        assert example.middle.strip()
        cuts.add((example.prefix[-1:] == "\n", example.suffix[:1] == "\n", example.middle[0]))
    assert len(cuts) > 8


def test_holes_as_the_vendors_example_has_them_are_asked() -> None:
    """https://api-docs.deepseek.com/guides/fim_completion: `def fib(a):` and its last line."""
    holes = [e for e in drawn(fim.TASKS[0], "en", 10000) if isinstance(e, Fill)]
    fib = [e for e in holes if re.fullmatch(r"def fib\(\w+\):", e.prefix)]
    assert any(re.fullmatch(r"    return fib\(\w-1\) \+ fib\(\w-2\)", e.suffix) for e in fib)


def test_code_is_judged_by_what_it_returns() -> None:
    random = Random(0)
    kind = next(kind for kind in functions.KINDS if kind.names[0].template == "larger")
    function = functions.write(random, "en", kind)
    assert functions.same_results(
        function, f"{function.head}\n    return max(*locals().values())", None
    )
    assert not functions.same_results(function, f"{function.head}\n    return 1", None)
    assert not functions.same_results(function, f"{function.head}\n    return max(", None)
    assert not functions.same_results(function, "def other(): pass", function.name)


def test_a_program_that_misbehaves_gives_no_results(monkeypatch: pytest.MonkeyPatch) -> None:
    assert running.results("def f(x):\n    return [x]", "f", [[1], ["a"]]) == ["[1]", "['a']"]
    assert running.results("import math\ndef f():\n    return math.inf", None, [[]]) == ["inf"]
    for bad in ("import os", "open('x', 'w')", "exit()", "print(1 / 0)", "x = [0] * 10**11"):
        assert running.results(f"{bad}\ndef f():\n    return 1", None, [[]]) is None
    endless = "while True:\n    pass"
    assert running.results(endless, None, []) is None  # by the limit of its CPU time
    monkeypatch.setattr(running, "_PATIENCE_S", 0.25)
    assert running.results(endless, None, []) is None


YES, NO = True, False


@pytest.mark.parametrize(
    "judge, text, right",
    [
        (judging.says_number(82), "37 + 45 = 82", YES),
        (judging.says_number(82), "The answer is **82**.", YES),
        (judging.says_number(82), "82 - 45 = 37", NO),
        (judging.says_number(-45), "21 - 66 = -45", YES),
        (judging.says_number(-45), "21 - 66 = 45", NO),
        (judging.says_number(15000), "That is 15,000 meters.", YES),
        (judging.says_number(5), "There are five items.", YES),
        (judging.says_number(12), "一共有十二个。", YES),
        (judging.says_number(5), "", NO),
        (judging.lists_numbers([3, 17, 42]), "Sorted: [3, 17, 42]", YES),
        (judging.lists_numbers([3, 17, 42]), "1. 3\n2. 17\n3. 42", YES),
        (judging.lists_numbers([3, 17, 42]), "42, 17, 3", NO),
        (judging.lists_numbers([3, 17, 42]), "3, 17, 42, 42", NO),
        (judging.lists_words(["ant", "bee"]), "Alphabetically:\n- ant\n- bee", YES),
        (judging.lists_words(["ant", "bee"]), "bee, ant", NO),
        (judging.lists_words(["ant", "bee"]), "giant, bee", NO),
        (judging.chooses("7", ["7", "70"]), "The largest number is 7.", YES),
        (judging.chooses("7", ["7", "70"]), "The largest number is 70.", NO),
        (judging.says_yes(True), "Yes, it is.", YES),
        (judging.says_yes(True), "不是。", NO),
        (judging.says_yes(False), "Nothing is known of it.", NO),
        (judging.says_yes(True), "Yesterday.", NO),
        (judging.says_yes(False), "不是，1999年不是闰年。", YES),
        (judging.says_text("RED CAT"), 'Sure: "RED CAT".', YES),
        (judging.says_text("RED CAT"), "Red Cat", NO),
        (judging.says_text("a, b"), "The list is:\na, b", YES),
        (judging.says_json({"a": 1}), '```json\n{"a": 1}\n```', YES),
        (judging.says_json({"a": 1}), '{"a": true}', NO),
        (judging.says_json({"a": 1}), '{"a": "1"}', NO),
        (judging.says_json({"a": 1}), "{a: 1}", NO),
    ],
)
def test_judges_read_the_result_in_other_words(
    judge: judging.Judge, text: str, right: bool
) -> None:
    assert judge(Answer(text)) is right


def test_the_operands_cover_two_digits() -> None:
    keys = {example.key for example in drawn(arithmetic.TASKS[0], "en", 5000)}
    assert any(key.startswith("99+") for key in keys)
    assert any(key.endswith("-99") for key in keys)
    share = sum("×" not in key for key in keys) / len(keys)
    assert share > 0.9


def test_weights_of_a_mixture() -> None:
    chosen = {entry.name: entry.weight for entry in weighted("sort=12.5,tools=7")}
    assert chosen == {e.name: e.weight for e in CATALOGUE} | {"sort": 12.5, "tools": 7.0}
    assert weighted("") == CATALOGUE


@pytest.mark.parametrize("text", ["sorting=1", "sort", "sort=much", "sort=0", "sort=nan"])
def test_wrong_weights(text: str) -> None:
    with pytest.raises(ValueError, match="sort"):
        weighted(text)
