"""The tokenizer: a thin, strict door to a Hugging Face `tokenizer.json`, and the way a small one is trained.

Text that looks like a special token is only ever one where the protocol wrote it: `encode` treats what users say as
plain text.
"""

import pathlib
from collections.abc import Iterable, Iterator, Sequence

import tokenizers

from jstream.errors import UserError

_MAX_TEMPLATES = 4096


class TokenizerError(UserError, ValueError):
    """A tokenizer that cannot be used; the message is one line."""


class Tokenizer:
    """Text to ids and back."""

    def __init__(self, inner: tokenizers.Tokenizer):
        self._inner = inner
        self._templates: dict[str, list[int]] = {}  # what `encode_template` gave: the same few texts, at every turn
        self.specials: dict[str, int] = {
            token.content: index for index, token in inner.get_added_tokens_decoder().items() if token.special
        }

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Reads a `tokenizer.json`, or the one in a folder.

        Raises:
            TokenizerError: names the file that is missing or cannot be read.
        """
        path = pathlib.Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:  # the tokenizers library raises bare Exception
            reason = str(error).splitlines()[0]
            raise TokenizerError(f"{path}: expected a tokenizer.json, found: {reason}") from None

    def save(self, path: str | pathlib.Path) -> None:
        """Writes a `tokenizer.json`; it appears whole or not at all."""
        path = pathlib.Path(path)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(self._inner.to_str(), encoding="utf-8")
        partial.replace(path)

    @property
    def vocab_size(self) -> int:
        return self._inner.get_vocab_size()

    def special(self, token: str) -> int:
        """Id of a special token.

        Raises:
            TokenizerError: where the vocabulary has no such special token.
        """
        if token not in self.specials:
            raise TokenizerError(
                f"expected the special token {token!r} in the vocabulary, found {', '.join(self.specials)}"
            )
        return self.specials[token]

    def with_specials(self, tokens: Sequence[str]) -> "Tokenizer":
        """The same tokenizer with more special tokens behind its last id; those it has keep theirs."""
        inner = tokenizers.Tokenizer.from_str(self._inner.to_str())
        inner.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in tokens])
        return Tokenizer(inner)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; what spells a special token in it is spelled out, not obeyed."""
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair, which JSON can carry, becomes "?"
        return [i for part in self._plain_parts(text) for i in self._inner.encode(part, add_special_tokens=False).ids]

    def encode_template(self, text: str) -> list[int]:
        """Ids of text the protocol wrote, special tokens included."""
        if text not in self._templates:
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.clear()
            self._templates[text] = self._inner.encode(text, add_special_tokens=False).ids
        return list(self._templates[text])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens; bytes that are not UTF-8 become �."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def _plain_parts(self, text: str) -> Iterator[str]:
        """Cuts text inside every special token it spells, so that none is recognised."""
        spelled = [token for token in self.specials if token in text]
        while spelled:
            at, token = min((text.index(token), token) for token in spelled)
            yield text[: at + 1]
            text = text[at + 1 :]
            spelled = [token for token in self.specials if token in text]
        if text:
            yield text


def train_tokenizer(texts: Iterable[str], vocab_size: int, specials: Sequence[str]) -> Tokenizer:
    """Trains a small byte-level BPE: any text can be written in it, frequent words and numbers are one token each.

    Args:
        texts: the corpus.
        vocab_size: at most so many ids, special tokens and the 256 bytes included.
        specials: special tokens; they get the first ids.
    """
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            # words with the space before and the newline after them, numbers of up to three digits, punctuation
            tokenizers.pre_tokenizers.Split(
                tokenizers.Regex(r" ?\p{L}+[>\-]?\n?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+\n?|\s+"), behavior="isolated"
            ),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = tokenizers.decoders.ByteLevel()  # type: ignore[assignment]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[tokenizers.AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner)
