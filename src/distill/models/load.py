"""Models, configurations and tokenizers as transformers loads and builds them, with errors for people.

Every failure of loading becomes one sentence with a remedy; transformers' errors are told apart by their type and a few
words of their text, which another version may word otherwise. Weights come as safetensors unless pickles are asked for,
and a checkpoint that leaves parameters unset is refused instead of filled with random numbers.
"""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from distill.batch import Tokens
from distill.errors import UserError, did_you_mean
from distill.models.explain import explain
from distill.models.gguf import model_folder
from distill.models.head import lm_head_of
from distill.models.quiet import quiet_transformers
from distill.models.trace import decode


def load_model(
    source: str,
    *,
    dtype: torch.dtype | None = torch.float32,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    key: str = "model.teacher",
) -> PreTrainedModel:
    """A causal language model in eval mode, as `from_pretrained` gives it.

    Args:
        source: hub id, local folder, GGUF file or `package://name/path`.
        dtype: of the weights; None = that of the files.
        trust_remote_code: run model code that comes with the weights.
        allow_pickle: accept `pytorch_model.bin`.
        key: YAML key that error messages name.

    Raises:
        UserError: unknown source, refused remote code or pickle, damaged or incomplete weights, not a causal LM.
    """
    folder = model_folder(source, key)
    try:
        with quiet_transformers(downloads=True):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto" if dtype is None else dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
            )
    except Exception as error:
        explain(error, source, key, folder)
        raise
    model, info = loaded
    if unset := sorted(info["missing_keys"]):
        raise UserError(
            f"{key}: {source!r} lacks {len(unset)} weights of {type(model).__name__} ({unset[0]}, ...); "
            "give a complete causal language model"
        )
    return model


def load_tokenizer(source: str, *, trust_remote_code: bool = False, key: str = "data.tokenizer") -> Any:
    """The tokenizer of a model source.

    Args:
        source: as for `load_model`.
        trust_remote_code: run tokenizer code that comes with the files.
        key: YAML key that error messages name.

    Raises:
        UserError: unknown source, refused remote code, no tokenizer files.
    """
    folder = model_folder(source, key)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        explain(error, source, key, folder, tokenizer=True)
        raise
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")  # a byte order mark is no text
    return tokenizer


def student_from_config(
    config: dict[str, Any] | str,
    *,
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    key: str = "model.student_config",
) -> PreTrainedModel:
    """A randomly initialised student in train mode.

    Args:
        config: configuration keys with `model_type`, or a source whose configuration is taken without its weights.
        vocab_size: number of ids where a dict does not say; the teacher's, so that both speak of the same tokens.
        dtype: of the weights.
        trust_remote_code: run model code that comes with a source.
        key: YAML key that error messages name.

    Raises:
        UserError: no or unknown `model_type`, unknown configuration key, values that do not fit together.
    """
    built = load_config(config, vocab_size=vocab_size, trust_remote_code=trust_remote_code, key=key)
    built.use_cache = False
    try:
        model = AutoModelForCausalLM.from_config(built, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, AssertionError, RuntimeError) as error:
        explain(error, str(config), key)
        raise UserError(f"{key}: {config!r} cannot be built ({str(error).splitlines()[0]}); correct it") from error
    return model.train()


def load_config(
    source: str | dict[str, Any],
    *,
    vocab_size: int | None = None,
    trust_remote_code: bool = False,
    key: str = "model.teacher",
) -> PreTrainedConfig:
    """The configuration of a model source, or the one that a dict with `model_type` describes.

    Args:
        source: as for `load_model`, or configuration keys.
        vocab_size: number of ids where a dict does not say.
        trust_remote_code: run configuration code that comes with a source.
        key: YAML key that error messages name.

    Raises:
        UserError: unknown source; no or unknown `model_type`, unknown configuration key, values of the wrong kind.
    """
    if isinstance(source, dict):
        return _config_from_dict(dict(source), vocab_size, key)
    folder = model_folder(source, key)
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        explain(error, source, key, folder)
        raise


def _config_from_dict(options: dict[str, Any], vocab_size: int | None, key: str) -> PreTrainedConfig:
    model_type = options.pop("model_type", None)
    if not isinstance(model_type, str):
        raise UserError(f"{key}.model_type: {model_type!r}; name a transformers model type such as llama")
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError as error:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

        near = did_you_mean(model_type, known)
        remedy = near if near.startswith("did") else "name a transformers model type such as llama"
        raise UserError(f"{key}.model_type: {model_type!r} is unknown; {remedy}") from error
    for name in options:
        if not hasattr(default, name):
            near = did_you_mean(name, default.to_dict())
            remedy = near if near.startswith("did") else f"see {type(default).__name__}"
            raise UserError(f"{key}.{name}: unknown to {type(default).__name__}; {remedy}")
    if vocab_size is not None:
        options.setdefault("vocab_size", vocab_size)
    try:
        return AutoConfig.for_model(model_type, **options)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{key}: {options!r} is no {type(default).__name__} ({reason}); correct it") from error


def check_vocabularies(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, key: str = "model.student"
) -> None:
    """Refuses two tokenizers whose ids mean different tokens.

    Ids that only one side has are padding and do no harm; neither do special tokens under another name.

    Raises:
        UserError: an id means different tokens.
    """
    teacher_ids, student_ids = teacher.get_vocab(), student.get_vocab()
    if teacher_ids == student_ids:
        return
    token_of = {index: token for token, index in teacher_ids.items()}
    special = teacher.added_tokens_decoder.keys() & student.added_tokens_decoder.keys()
    differing = [
        (index, token_of[index], token)
        for token, index in student_ids.items()
        if index in token_of and token_of[index] != token and index not in special
    ]
    if differing:
        index, teacher_token, student_token = min(differing)
        raise UserError(
            f"{key}: its tokenizer differs from the teacher's in {len(differing)} ids (id {index} is {teacher_token!r} "
            f"for the teacher, {student_token!r} for the student); choose a student with the teacher's tokenizer, or "
            "leave model.vocabulary on and the data to a DistillationDataModule"
        )


@torch.no_grad()
def build_student(
    teacher: PreTrainedModel,
    teacher_source: str,
    *,
    student: str | None,
    student_config: str | dict[str, Any] | None,
    own_tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> PreTrainedModel:
    """A student in fp32, from weights or a configuration.

    Args:
        teacher: gives the number of ids where nothing else does.
        teacher_source: of its tokenizer.
        student: source of the weights.
        student_config: source or keys of the configuration.
        own_tokenizer: that the student reads with; None = the teacher's.
        trust_remote_code: run code that comes with a source.
        allow_pickle: accept `pytorch_model.bin`.

    Raises:
        UserError: as the loaders do; ids that mean different tokens, or fewer of them than the tokenizer has.
    """
    whose = "the teacher's" if own_tokenizer is None else "its"
    tokenizer = own_tokenizer or load_tokenizer(
        teacher_source, trust_remote_code=trust_remote_code, key="model.teacher"
    )
    if student_config is not None:
        key = "model.student_config"
        vocab_size = lm_head_of(teacher).vocab_size if own_tokenizer is None else len(own_tokenizer)
        model = student_from_config(student_config, vocab_size=vocab_size, trust_remote_code=trust_remote_code, key=key)
    else:
        assert student is not None
        key = "model.student"
        model = load_model(student, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, key=key)
        if own_tokenizer is None:
            its = load_tokenizer(student, trust_remote_code=trust_remote_code, key=key)
            check_vocabularies(tokenizer, its, key)
    if own_tokenizer is not None and student_config is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the config's defaults mean other tokens
            for place in (model.config, model.generation_config):
                setattr(place, name, getattr(own_tokenizer, name))
    rows = lm_head_of(model).vocab_size
    if rows < len(tokenizer):
        raise UserError(
            f"{key}: a vocabulary of {rows} ids is smaller than the {len(tokenizer)} of {whose} tokenizer; "
            "give a student that has them all"
        )
    return model


def check_packing(model: PreTrainedModel, key: str = "model.teacher") -> None:
    """Refuses a model in which the documents of a packed row see each other.

    Many families take the borders of documents from `position_ids`, but others ignore them without a word (gpt_oss,
    OPT, ALiBi and state-space models), so what comes before a document in a short packed row is exchanged.

    Args:
        model: on any device, in any mode, not sharded.
        key: YAML key that error messages name.

    Raises:
        UserError: what comes before a document changes the model's states for it.
    """
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    one_T, other_T, second_T = torch.arange(12, device=model.device).remainder(vocab_size).split(4)
    ids_BL = torch.stack([torch.cat([one_T, second_T]), torch.cat([other_T, second_T])])
    positions_BL = torch.arange(4, device=ids_BL.device).repeat(2, 2)
    tokens = Tokens(ids_BL, ids_BL, torch.ones_like(ids_BL), positions_BL, ids_BL[0, :-1], packed=True)
    training = model.training
    states_BLD = decode(model.eval(), tokens).last_hidden_state.float()
    model.train(training)
    behind_one_TD, behind_other_TD = states_BLD[:, 4:]
    if (behind_one_TD - behind_other_TD).norm() > 1e-3 * behind_one_TD.norm():
        raise UserError(
            f"{key}: in packed rows {type(model).__name__} lets documents see each other; set data.packing to false"
        )


def max_context(config: PreTrainedConfig) -> int | None:
    """Longest sequence in tokens that a model was built for, or None where its positions know no bound."""
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
