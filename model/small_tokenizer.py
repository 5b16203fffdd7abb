"""A small tokenizer with V3's pre-tokeniser, layout and special-token names (spec section 5.1).

Byte-level BPE, so that any text encodes and words common in what it learnt from are one token.
Like V3's, it ends in the control tokens and defines fewer ids than the model has rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

UNDEFINED_IDS = 16  # at least so many rows of the embedding have no token
FIRST_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
LAST_TOKENS = (
    "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>",
    "<｜User｜>", "<｜Assistant｜>", "<|EOT|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁sep｜>",
)  # fmt: skip
MIN_VOCAB = 256 + len(FIRST_TOKENS) + len(LAST_TOKENS) + UNDEFINED_IDS

RARE = 2.5e-5  # a character that is less of the text is left to its bytes
LONGEST_CHINESE = 4  # characters of a token: a word, but no half sentence

NUMBERS = r"\p{N}{1,3}"
KANA_AND_HAN = "[一-龥\u3040-ゟ゠-ヿ]+"
WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^NL\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[NL]*|\s*[NL]+|\s+(?!\S)|\s+"""
).replace("NL", "\r\n")  # the characters themselves, as in the official file

TEXT = '''
You are a helpful assistant. The user asks a question and the assistant gives a short answer.
Hello! How can I help you today? What is the weather like in the capital of France this week?
The sun rises in the east and sets in the west, and the moon goes around the earth every month.
Water becomes ice when it is cold, and steam when it is hot; both are still the same water.
A language model reads the text one token after another and predicts which token comes next.
It was the best time of the year: the trees were green, the birds were singing, and children
played in the garden behind the old house. Once upon a time there was a small fox who lived near
a mountain. One morning the fox saw a key on the ground. A cat came and asked for help. Together
they looked at it and smiled. From that day on they were never alone.
People often write long letters to their friends about work, food, music, books and family.
The first thing you should do is think about what you want, then make a plan, and then begin.
She said that he would not have been able to finish his work without them. They could have gone
there before, because there is more than one way to do it. Some of these answers may be wrong;
please check every number, name, date and place again before you send the message to others.
I do not know that, but I will try to find out. Thank you very much, see you again tomorrow!
Where does the train leave from, when does it arrive, who is on it, why is it late, how long
does it take? My mother told me about our new school: many students, few teachers, large rooms.
Monday Tuesday Wednesday Thursday Friday Saturday Sunday. January February March April May June
July August September October November December. one two three four five six seven eight nine ten
red green blue black white yellow. north south east west, left right, up down, yes no, true false
Paris London Berlin Rome Madrid Tokyo Beijing Shanghai New York; France England Germany Italy
Each layer has attention over the latent cache and a mixture of experts; the router chooses a few
of them for each token, a shared expert sees all tokens, and the results are added together.
The server starts, loads the weights, checks the config, and prints its address. If a process is
lost, another one takes over, and the client sees only a pause. Requests wait in a queue until
there is room; when the cache is full, old pages are dropped. Errors say what was wrong and where.
# How to use it
- first, install the package: `pip install package`
- then, run `make serve` and open http://localhost:8000/v1/models in your browser
def main(args: list[str]) -> int:
    """Return the number of words in each file."""
    for index, line in enumerate(open(args[0])):
        if not line.strip() or line.startswith("#"):
            continue
        print(f"{index}: {len(line.split())}")
    return 0
class Point:
    def __init__(self, x: float, y: float) -> None:
        self.x = x
        self.y = y
    def is_even(n): return n % 2 == 0
import json, os, sys
from pathlib import Path
while True:
    try:
        value = int(input("value = "))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    else:
        break
```json
{"name": "get_weather", "arguments": {"location": "Hangzhou", "unit": "celsius", "days": 3}}
{"type": "object", "properties": {"city": {"type": "string", "description": "The name"}},
 "required": ["city"], "additionalProperties": false}
[{"id": 1, "title": "first", "done": true}, {"id": 2, "title": null, "tags": ["a", "b"]}]
```
function add(a, b) { return a + b; } // const x = await fetch(url); <div class="main"></div>
SELECT name, count(*) FROM users WHERE age > 18 GROUP BY name ORDER BY count(*) DESC LIMIT 10;
你好！有什么可以帮你？我是一个语言模型，可以回答问题，写代码，翻译文字。
法国的首都是巴黎。中国的首都是北京。今天天气很好，我们一起去公园。
请用中文回答。谢谢你的帮助，再见。他们不知道这是什么，但是我们可以学习。
一 二 三 四 五 六 七 八 九 十 年 月 日 时 分 人 大 小 上 下 不 的 了 在 有 和
'''


def small_tokenizer(vocab_size: int) -> tuple[str, str]:
    """`learn_tokenizer` from the text above: for models of random weights."""
    return learn_tokenizer(TEXT.splitlines(keepends=True), vocab_size)


def learn_tokenizer(texts: Sequence[str], vocab_size: int) -> tuple[str, str]:
    """The texts of `tokenizer.json` and `tokenizer_config.json` for a model of so many rows.

    Depends on the texts alone, not on their order. Defines at most vocab_size - UNDEFINED_IDS ids.
    Raises ValueError below MIN_VOCAB rows.
    """
    if vocab_size < MIN_VOCAB:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: bytes and special tokens need {MIN_VOCAB}"
        )
    learnt = _learn(texts, vocab_size - UNDEFINED_IDS - len(LAST_TOKENS))
    last = len(learnt["vocab"])
    tokens = [*enumerate(FIRST_TOKENS), *enumerate(LAST_TOKENS, start=last)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    splits = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in (NUMBERS, KANA_AND_HAN, WORDS)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(id, content) for id, content in tokens],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*splits, byte_level | {"use_regex": False}],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": learnt,
    }
    return _text(tokenizer), _text(_settings())


def _learn(texts: Sequence[str], size: int) -> dict[str, Any]:
    """A BPE model of at most `size` tokens: FIRST_TOKENS, bytes, characters, pieces of words.

    It is learnt over characters and then spelt in bytes, so that no token but the first bytes of
    one character holds a part of a character.
    """
    seen = Counter(char for text in texts for char in text)
    common = sorted((char for char in seen if not char.isascii()), key=lambda c: (-seen[c], c))
    common = [c for c in common if seen[c] >= RARE * seen.total()][: size // 3]
    alphabet = [*map(chr, range(128)), *common]
    # Trained with one digit a piece, so that no merge holds a digit: 1234 never looks like 123.
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(p), "isolated") for p in (r"\p{N}", KANA_AND_HAN, WORDS)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2 * size,  # of which the first good ones are kept
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        max_token_length=24,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learnt: dict[str, Any] = json.loads(learner.to_str())["model"]

    vocab = dict.fromkeys([*FIRST_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    characters = [
        (spelt[:i], spelt[i]) for spelt in map(_spelt, common) for i in range(1, len(spelt))
    ]
    words = [
        (_spelt(left), _spelt(right))
        for left, right in learnt["merges"]
        if (left + right).isascii() or len(left + right) <= LONGEST_CHINESE
    ]
    merges = []
    for left, right in (*characters, *words):
        if len(vocab) < size and left in vocab and right in vocab and left + right not in vocab:
            vocab[left + right] = None
            merges.append((left, right))
    ids = {token: id for id, token in enumerate(vocab)}
    return {**learnt, "vocab": ids, "merges": merges}


def _spelt(text: str) -> str:
    """In the byte-level alphabet: one letter for each byte."""
    speller = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(word for word, _ in speller.pre_tokenize_str(text))


def _added(id: int, content: str) -> dict[str, Any]:
    """As in V3: the first three and EOT are skipped in decoded text, the other markers are not."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    first = content in FIRST_TOKENS
    special = first or content == "<|EOT|>"
    return {"id": id, "content": content, **flags, "normalized": not first, "special": special}


def _settings() -> dict[str, Any]:
    bos, eos, _ = FIRST_TOKENS
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_max_length": 131072,
        "pad_token": eos,
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
    }


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
