"""A small word-level tokenizer with a real chat template."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

DIGIT_WORDS = tuple(str(number) for number in range(11))
ANSWERS = ("<answer>[[A]]</answer>", "<answer>[[B]]</answer>")
VERDICT_WORDS = ("ok", "bad", "Yes", "No", "A", "B", "<s>", "</s>", *ANSWERS)
WORDS = ("<|unk|>", *DIGIT_WORDS, *VERDICT_WORDS, "check", "rate", "score", "compare")
CONTROL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
IDS = {word: index for index, word in enumerate((*WORDS, *CONTROL))}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('only user and assistant turns are known') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word, in the order of `IDS`. A turn is the token of its role, its words and `<|end|>`.

    The control tokens are not words of the vocabulary: text that spells one is encoded as unknown words.
    """
    core = Tokenizer(WordLevel({word: IDS[word] for word in WORDS}, unk_token="<|unk|>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.add_special_tokens(list(CONTROL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
