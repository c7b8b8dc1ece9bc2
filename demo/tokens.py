"""Make the demo's CLIP tokenizer: byte-level BPE in which each word of the grammar is one token."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merge the most frequent pair again and again until each of `words` is one symbol.

    Encoding replays the merges in this order, so the words come out whole there too.
    """
    spelled = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in spelled for pair in pairwise(word))
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(word, best) for word in spelled]


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def build_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """A tokenizer whose vocabulary is all bytes, the merges of `words`, and the two specials."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = learn_merges(words)
    symbols = [*alphabet, *(char + END_OF_WORD for char in alphabet)]
    symbols += ["".join(pair) for pair in merges]
    # Two merges can give the same symbol ("a"+"bc", "ab"+"c"): it is one entry.
    vocab = {symbol: index for index, symbol in enumerate(dict.fromkeys([*symbols, START, END]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
