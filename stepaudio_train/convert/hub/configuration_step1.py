"""Configuration of Step-1, for transformers 4.48 and later (`trust_remote_code=True`)."""

from transformers import PretrainedConfig


class Step1Config(PretrainedConfig):
    """Sizes of a Step-1 decoder, with the field names of the released config.json.

    Args:
        num_attention_groups: key/value heads; each serves contiguous query heads.
        max_seq_len: tokens of the longest sequence it was trained on. Nothing is computed from it.
        value_head: whether there is a `value_head`, as reward models and critics have it.

    Raises:
        ValueError: heads do not divide, or the head is said to be tied to the embedding.
    """

    model_type = "step1"
    attribute_map = {"num_key_value_heads": "num_attention_groups", "max_position_embeddings": "max_seq_len"}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        hidden_size: int = 5120,
        intermediate_size: int = 13312,
        num_attention_heads: int = 40,
        num_attention_groups: int = 8,
        num_hidden_layers: int = 48,
        max_seq_len: int = 4096,
        vocab_size: int = 65536,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int = 1,
        eos_token_id: int = 3,
        pad_token_id: int = 0,
        tie_word_embeddings: bool = False,
        value_head: bool = False,
        **kwargs,
    ) -> None:
        if hidden_size % num_attention_heads or num_attention_heads % num_attention_groups:
            raise ValueError(
                f"hidden_size={hidden_size} must be a multiple of num_attention_heads={num_attention_heads}, and that "
                f"of num_attention_groups={num_attention_groups}"
            )
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_attention_groups = num_attention_groups
        self.num_hidden_layers = num_hidden_layers
        self.max_seq_len = max_seq_len
        self.vocab_size = vocab_size
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.value_head = value_head
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self.require_untied()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def require_untied(self) -> None:
        """Raise ValueError where the configuration would replace the head by the embedding."""
        if self.tie_word_embeddings:
            raise ValueError("Step-1's lm_head is never tied to the embedding; set tie_word_embeddings to false")
