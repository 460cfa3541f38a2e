"""Attention of packed rows without a dense mask: what documents give alone, for families that allow it."""

import pytest
import torch

from distill.errors import UserError
from distill.models.attention import NAME, settle_attention
from distill.models.load import check_packing
from distill.models.trace import Needs, decode, trace
from helpers.packed import make_batch, separate
from helpers.tiny import (
    tiny_deepseek_v3,
    tiny_gemma,
    tiny_gpt2,
    tiny_gpt_oss,
    tiny_llama,
    tiny_mixtral,
    tiny_qwen2,
    tiny_qwen3_moe,
)

FAMILIES = [tiny_llama, tiny_qwen2, tiny_gemma, tiny_gpt2, tiny_mixtral, tiny_qwen3_moe, tiny_deepseek_v3]


@pytest.fixture
def varlen(monkeypatch):
    """Switches a model; after that transformers may not look for packed rows: the host would wait for the answer."""
    import transformers.masking_utils

    def look(position_ids):
        raise AssertionError("looked for packed rows")

    def switch(model):
        settle_attention(model, "varlen", "cpu", "model.student")
        check_packing(model)
        assert model.get_decoder().config._attn_implementation == NAME
        monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", look)
        return model

    return switch


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_packed_rows_equal_their_documents(make, varlen):
    model = varlen(make())
    batch = make_batch([[5, 9, 3], [12]], 20)
    packed_ND = batch.student.valid(decode(model, batch.student).last_hidden_state)
    alone_ND = torch.cat([one.student.valid(decode(model, one.student).last_hidden_state) for one in separate(batch)])
    torch.testing.assert_close(packed_ND, alone_ND, rtol=1e-5, atol=1e-5)
    factors = torch.linspace(-1, 1, packed_ND.numel()).view_as(packed_ND)  # squares of normed states would be constant
    weight = model.get_input_embeddings().weight
    gradients = [torch.autograd.grad((states * factors).sum(), weight)[0] for states in (packed_ND, alone_ND)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_windows_are_kept(varlen):
    """Of four positions, in rows of one document and of several, as transformers' own attention has them."""
    ours, theirs = varlen(tiny_gemma(sliding_window=4)), tiny_gemma(sliding_window=4)
    packed = make_batch([[9, 7]], 16).student
    for tokens in (make_batch([[16], [16]], 16).student, packed):
        found_BLD = decode(ours, tokens).last_hidden_state
        documents = [slice(0, 9), slice(9, 16)] if tokens is packed else [slice(0, 16)]
        for place in documents:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
                alone_BLD = theirs.get_decoder()(tokens.input_ids[:, place], use_cache=False).last_hidden_state
            torch.testing.assert_close(found_BLD[:, place], alone_BLD, rtol=1e-5, atol=1e-5)


def test_a_batch_says_where_its_documents_begin():
    from distill.data.rows.table import collate

    row = {"input_ids": torch.arange(9).numpy(), "labels": torch.arange(9).numpy(), "document_lengths": [4, 5],
           "bytes": 9}  # fmt: skip
    tokens = collate([row, row], 12, 0, {"tokens": 1}).student
    assert tokens.starts.tolist() == [0, 4, 9, 12, 16, 21, 24]
    assert tokens.longest == 5
    read = make_batch([[4, 5], [4, 5]], 12).student.documents
    assert (read.starts.tolist(), read.longest) == (tokens.starts.tolist(), tokens.longest)
    mask_BLL = tokens.documents.mask(2)[:, 0]
    same = tokens.document_BL[:, :, None] == tokens.document_BL[:, None]
    assert torch.equal(mask_BLL, same.tril())


def test_attention_is_read_with_its_mask(varlen):
    tokens = make_batch([[5, 7]], 12).student
    qkv = trace(varlen(tiny_llama()), tokens, Needs(attention=frozenset([1]))).attention[1]
    assert torch.equal(qkv.mask, tokens.documents.mask(1))
    assert qkv.plain


def test_what_a_family_does_not_allow_is_refused_or_left(monkeypatch):
    sinks = tiny_gpt_oss()
    with pytest.raises(
        UserError, match=r"model.attn_implementation: varlen is nothing for model.student, since it runs"
    ):
        settle_attention(sinks, "varlen", "cuda", "model.student")
    settle_attention(sinks, "auto", "cuda", "model.student")
    assert sinks.config._attn_implementation == "eager"
    chunked = tiny_llama()
    chunked.config.attention_chunk_size = 4
    settle_attention(chunked, "auto", "cuda", "model.student")
    assert chunked.config._attn_implementation == "sdpa"


def test_auto_changes_nothing_on_a_cpu():
    model = tiny_llama()
    settle_attention(model, "auto", "cpu", "model.student")
    assert model.config._attn_implementation == "sdpa"
    settle_attention(model, "auto", "cuda", "model.student")
    assert model.config._attn_implementation == NAME
    settle_attention(model, "eager", "cpu", "model.student")
    assert model.config._attn_implementation == "eager"
