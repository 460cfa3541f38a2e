"""Which tokenizers count as one."""

import pytest
from tokenizers import AddedToken

from distill.vocabularies.relation import relation
from helpers.tokenizers import byte_bpe, real, sentencepiece_bpe, spelled_bpe


def test_a_tokenizer_is_the_same_as_itself_and_as_its_copy():
    one = byte_bpe(300)
    assert relation(one, one) == relation(one, byte_bpe(300)) == "same"


def test_added_and_renamed_special_tokens_make_no_difference():
    one, other = byte_bpe(300), byte_bpe(300)
    other.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<think>", special=False)])
    assert relation(one, other) == relation(other, one) == "same"
    one.add_tokens([AddedToken("<|turn|>", special=True)])
    assert relation(one, other) == "same"


def test_fewer_merges_or_other_ids_are_different():
    assert relation(byte_bpe(320), byte_bpe(300)) == "different"
    merges = [("a", "b"), ("b", "c")]
    assert relation(spelled_bpe(merges), spelled_bpe(merges, letters="cab")) == "different"
    assert relation(byte_bpe(700), sentencepiece_bpe(700)) == "different"


@pytest.mark.slow
def test_real_tokenizers_are_all_different():
    names = ("smollm2", "qwen3", "llama3", "llama2", "gemma3")
    for one in names:
        for other in names:
            assert relation(real(one), real(other)) == ("same" if other == one else "different")
