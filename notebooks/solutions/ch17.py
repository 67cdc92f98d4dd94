"""Solutions to the exercises of chapter 17, answers with a shape."""

from __future__ import annotations


def choice_mask(choices, so_far, tokens, eos):
    """A token may come if some choice begins with all that there would be then."""
    allowed = {
        token_id
        for token_id, text in enumerate(tokens)
        if text and token_id != eos and any(choice.startswith(so_far + text) for choice in choices)
    }
    return allowed | ({eos} if so_far in choices else set())


def closing(text):
    """A stack of what closes the open brackets, and whether a string is open."""
    open_, in_string, is_escaped = [], False, False
    for character in text:
        if is_escaped:
            is_escaped = False
        elif in_string:
            is_escaped, in_string = character == "\\", character != '"'
        elif character == '"':
            in_string = True
        elif character in "[{":
            open_.append("]" if character == "[" else "}")
        elif character in "]}":
            open_.pop()
    return '"' * in_string + "".join(reversed(open_))


def forced_bytes(dfa, accepting, state):
    """On, as long as there is one way and no end."""
    found = bytearray()
    while state not in accepting and len(dfa[state]) == 1:
        ((byte, state),) = dfa[state].items()
        found.append(byte)
    return bytes(found)


class Thoughts:
    """Holds back the longest end that may begin the marker."""

    END = "</think>"

    def __init__(self):
        self.held, self.has_ended = "", False

    def feed(self, text):
        if self.has_ended:
            return "", text
        thought, marker, content = (self.held + text).partition(self.END)
        if marker:
            self.held, self.has_ended = "", True
            return thought, content
        sizes = range(min(len(thought), len(self.END) - 1), 0, -1)
        size = next((n for n in sizes if thought.endswith(self.END[:n])), 0)
        self.held = thought[len(thought) - size :]
        return thought[: len(thought) - size], ""

    def finish(self):
        held, self.held = self.held, ""
        return held, ""
