"""The tokenizer: byte-level BPE trained on the grammar, so that every word it uses is one token."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from paged_infer.storyteller.stories.grammar import END, tell
from paged_infer.storyteller.training.drill import drill

VOCABULARY = 2048  # an upper bound: merging ends at 1,799, when every word is one token
CHAT_TEMPLATE = Path(__file__).parents[1] / "chat_template.jinja"


def train_tokenizer(num_stories: int = 20_000) -> Tokenizer:
    """A byte-level BPE tokenizer whose merges come from the first stories; `<|endoftext|>` is id 0.

    All 256 bytes are in the vocabulary, so any text can be encoded. Words are split before merging as GPT-2
    does (a leading space belongs to its word), without its special case for 's and 't.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for seed in range(num_stories) for text in (tell(seed).text, drill(seed).text))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, chat_template: Path = CHAT_TEMPLATE) -> None:
    """Write `tokenizer` and its chat template as transformers' `AutoTokenizer.from_pretrained(folder)` loads them."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, model_max_length=1024, clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = chat_template.read_text(encoding="utf-8")
    wrapped.save_pretrained(folder)
