"""Wrong answers to the exercises of chapter 17."""

from __future__ import annotations

from planted import wrong
from solutions import ch17


@wrong("choice_mask", "the text may end here")
def never_ends(choices, so_far, tokens, eos):
    return ch17.choice_mask(choices, so_far, tokens, eos) - {eos}


@wrong("choice_mask", "leads nowhere")
def looks_at_the_first_byte(choices, so_far, tokens, eos):
    rest = [choice[len(so_far) :] for choice in choices if choice.startswith(so_far)]
    found = {i for i, text in enumerate(tokens) if text and any(one[:1] == text[:1] for one in rest)}
    return found | ({eos} if so_far in choices else set())


@wrong("choice_mask", "a special token is in no choice")
def allows_what_has_no_bytes(choices, so_far, tokens, eos):
    found = {i for i, text in enumerate(tokens) if any(c.startswith(so_far + (text or b"")) for c in choices)}
    return (found - {eos}) | ({eos} if so_far in choices else set())


@wrong("choice_mask", "leads nowhere")
def forgets_what_has_come(choices, so_far, tokens, eos):
    rest = [choice[len(so_far) :] for choice in choices]
    found = {i for i, text in enumerate(tokens) if text and any(one.startswith(text) for one in rest)}
    return found | ({eos} if so_far in choices else set())


@wrong("closing", r"is not JSON")
def closes_in_the_order_of_opening(text):
    return "".join(reversed(ch17.closing(text)))


@wrong("closing", r"is not JSON")
def counts_brackets_in_strings(text):
    stack = []
    for character in text:
        if character in "[{":
            stack.append("]" if character == "[" else "}")
        elif character in "]}":
            stack.pop()
    return '"' * (text.count('"') % 2) + "".join(reversed(stack))


@wrong("closing", r"is not JSON")
def closes_what_a_string_closes(text):
    stack, in_string = [], False
    for place, character in enumerate(text):
        if character == '"' and text[place - 1 : place] != "\\":
            in_string = not in_string
        elif character in "[{" and not in_string:
            stack.append("]" if character == "[" else "}")
        elif character in "]}" and stack:
            stack.pop()
    return '"' * in_string + "".join(reversed(stack))


@wrong("closing", r"is not JSON")
def takes_a_backslash_before_a_quotation_mark_for_its_escape(text):
    return ch17.closing(text.replace('\\"', ""))


@wrong("closing", r"is enough")
def adds_an_element(text):
    found = ch17.closing(text)
    return found.replace("]", ",0]", 1) if found.startswith("]") else found


@wrong("forced_bytes", "nothing is forced")
def goes_on_behind_an_end(dfa, accepting, state):
    return ch17.forced_bytes(dfa, set(), state)


@wrong("forced_bytes", "and yours gives")
def gives_one_byte(dfa, accepting, state):
    return ch17.forced_bytes(dfa, accepting, state)[:1]


@wrong("forced_bytes", "nothing is forced")
def looks_at_states_only(dfa, accepting, state):
    found = bytearray()
    while state not in accepting and len(set(dfa[state].values())) == 1:
        byte, state = next(iter(dfa[state].items()))
        found.append(byte)
    return bytes(found)


@wrong("Thoughts", "may be the marker's beginning")
class HoldsNothingBack(ch17.Thoughts):
    def feed(self, text):
        thought, content = super().feed(text)
        held, self.held = self.held, ""
        return thought + held, content


@wrong("Thoughts", "is certain, and only")
class WaitsForTheEnd(ch17.Thoughts):
    def feed(self, text):
        if not self.has_ended and self.END not in self.held + text:
            self.held += text
            return "", ""
        return super().feed(text)


@wrong("Thoughts", "the content is")
class FindsTheLastMarker(ch17.Thoughts):
    def feed(self, text):
        if self.has_ended:
            return "", text.replace(self.END, "")
        thought, content = super().feed(text)
        return thought, content.replace(self.END, "")


@wrong("Thoughts", "there is no marker")
class TakesTheRestForContent(ch17.Thoughts):
    def finish(self):
        return super().finish()[::-1]


@wrong("Thoughts", "is certain, and only")
class HoldsSevenCharacters(ch17.Thoughts):
    def feed(self, text):
        if self.has_ended or self.END in self.held + text:
            return super().feed(text)
        thought = self.held + text
        self.held = thought[-7:]
        return thought[:-7], ""


@wrong("Thoughts", "may be the marker's beginning")
class HoldsTheBracketOnly(ch17.Thoughts):
    def feed(self, text):
        if self.has_ended or self.END in self.held + text:
            return super().feed(text)
        thought = self.held + text
        self.held = "<" if thought.endswith("<") else ""
        return thought.removesuffix("<"), ""
