"""NEO: word and patch embeddings -> one decoder -> head, aware of its pipeline stage.

Shape suffixes: B packs of a micro-batch, T tokens of a pack, R of them held by this context-parallel rank, S of those
by this rank under sequence parallelism (R otherwise), C image tokens, M trained positions, H hidden size, V vocabulary.
"""

from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from neo_megatron.model.core_attention import attention_pairs, build_mask, check_backend
from neo_megatron.model.expert_router import Tokens
from neo_megatron.model.head_loss import in_chunks
from neo_megatron.model.image_attention import MeasuredRows
from neo_megatron.model.layer_specs import decoder_spec
from neo_megatron.model.mask import AttentionRule
from neo_megatron.model.native_attention import PackContext
from neo_megatron.model.native_rope import NativeRotary
from neo_megatron.model.patch_embedding import PatchEmbedding
from neo_megatron.model.transformer_config import NeoConfig


class NeoModel(LanguageModule):
    """The layers of one pipeline stage; the first also embeds, the last also has the head and the loss.

    Pre-buffer and post-LLM layers are one stack: `decoder.layers` in the order of the checkpoint, pre-buffer first.

    Attributes:
        attention_pairs: of the last micro-batch, for the log: what `core_attention.attention_pairs` gives where this
            is the last stage and trains, else ``None``.
    """

    def __init__(
        self,
        config: NeoConfig,
        pre_process: bool = True,
        post_process: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        check_backend(config.attention_backend)
        super().__init__(config=config, pg_collection=pg_collection)
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.attention_pairs: Tensor | None = None
        self.model_type = ModelType.encoder_or_decoder
        sizes = config.sizes
        self.share_embeddings_and_output_weights = sizes.tie_word_embeddings
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=sizes.vocab_size,
                max_sequence_length=sizes.max_positions,
                position_embedding_type="none",
                tp_group=self.pg_collection.tp,
            )
            self.patch_embedding = PatchEmbedding(config)
        self.decoder = TransformerBlock(
            config=config,
            spec=decoder_spec(config, vp_stage=vp_stage, pp_rank=self.pg_collection.pp.rank()),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                sizes.hidden_size,
                sizes.vocab_size,
                config=config.for_megatron_layers(),
                init_method=config.init_method,
                bias=False,
                skip_weight_param_allocation=pre_process and sizes.tie_word_embeddings,
                # Trained positions are picked from the complete sequence, so `_head_input` communicates, not the layer.
                disable_grad_reduce=True,
                tp_group=self.pg_collection.tp,
            )
            self.output_layer.sequence_parallel = False
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()
        self.register_load_state_dict_post_hook(_forgive_missing_extra_state)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The contents of a distributed checkpoint: the parameters, under one name for every layout and implementation.

        Linear layers also offer an `_extra_state`, those of experts a numbered one each: under FP8's delayed scaling
        the last maxima, else nothing. It is left out, so that every checkpoint starts every run, in FP8 or not; delayed
        scaling has its maxima after a step.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {name: value for name, value in state.items() if "_extra_state" not in name}

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Receives the hidden states ``[S, B, H]`` of the previous pipeline stage (called by Megatron's schedules)."""
        (tensor,) = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        self.decoder.set_input_tensor(tensor)

    def forward(
        self,
        *,
        positions_thw: Tensor,
        document: Tensor,
        image: Tensor,
        query_rows: Tensor | None = None,
        key_order: Tensor | None = None,
        tokens: Tensor | None = None,
        patches: Tensor | None = None,
        image_token_index: Tensor | None = None,
        image_token_position: Tensor | None = None,
        target_index: Tensor | None = None,
        targets: Tensor | None = None,
        modality: Tensor | None = None,
        loss_weights: Tensor | None = None,
        measured_rows: Tensor | None = None,
    ) -> Tensor:
        """One micro-batch through this pipeline stage.

        Args:
            positions_thw: integers ``[B, R, 3]``.
            document, image: int32 ``[B, T]``, see `mask.py`.
            query_rows: int64 ``[R]``, which tokens of the packs these are; ``None`` where attention sees all T rows.
            key_order: int64 ``[T]``, see `context_parallel_attention`.
            tokens: int64 ``[B, R]``; read on the first stage only, as are the next three.
            patches: uint8 ``[C, 4, 768]`` in 2x2-block order.
            image_token_index: int64 ``[C]``, rows of the flattened ``[S * B]`` hidden states of the image tokens.
            image_token_position: integers ``[C, 2]``, row and column of each image token in the merged grid.
            target_index: int64 ``[M]``, rows of the flattened ``[R * B]`` hidden states whose next token is trained.
            targets: int64 ``[M]``, those next tokens.
            modality, loss_weights: for experts, see `expert_router.Tokens`: int8 ``[S * B]`` and float32 ``[2]``.
            measured_rows: int64, see `image_attention.MeasuredRows`; ``None`` where attention is not measured.

        Returns:
            Last stage: cross entropy float32 ``[M]``, or without targets the logits ``[R * B, V / tp]``.
            Other stages: hidden states ``[S, B, H]``.
        """
        hidden = self._embed(tokens, patches, image_token_index, image_token_position) if self.pre_process else None
        config = self.config
        rule = AttentionRule(document, image, query_rows)
        mask = build_mask(
            rule,
            config.params_dtype,
            config.sizes.attention_widths,
            config.attention_backend,
            config.attention_kernel_options,
        )
        self.attention_pairs = attention_pairs(mask) if self.post_process and self.training else None
        context = PackContext(
            rotary=NativeRotary.from_positions(
                positions_thw, config.sizes.axis_widths, config.sizes.rope_theta, config.sizes.rope_theta_hw
            ),
            mask=mask,
            key_order=key_order,
            tokens=None if modality is None else Tokens(modality, loss_weights),
            measured=None if measured_rows is None else MeasuredRows(rule, measured_rows),
        )
        hidden = self.decoder(hidden, attention_mask=None, packed_seq_params=context)
        if not self.post_process:
            return hidden
        rows = self._head_input(hidden)
        if target_index is not None:
            rows = rows.index_select(0, target_index)
        if targets is None:
            return self._logits(rows)
        return in_chunks(self._cross_entropy, rows, targets, config.sizes.vocab_size // self.pg_collection.tp.size())

    def _logits(self, rows_MH: Tensor) -> Tensor:
        """``[M, V / tp]``."""
        shared_weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(rows_MH, weight=shared_weight)[0]

    def _cross_entropy(self, rows_MH: Tensor, targets_M: Tensor) -> Tensor:
        """Float32 ``[M]`` whatever the dtype of the logits; Megatron takes them as ``[M, 1, V / tp]``."""
        return self.compute_language_model_loss(targets_M[None], self._logits(rows_MH)[:, None]).squeeze(0)

    def _embed(
        self, tokens: Tensor, patches: Tensor, image_token_index: Tensor, image_token_position: Tensor
    ) -> Tensor:
        """Word embeddings ``[S, B, H]`` with embedded patches written over the `<IMG_CONTEXT>` tokens.

        Without any image the patch embedding still runs, on no tokens: its gradients are then zero, not missing,
        which Megatron's gradient buckets rely on.
        """
        hidden = self.embedding(input_ids=tokens, position_ids=None)
        embedded = self.patch_embedding(patches, row_C=image_token_position[:, 0], column_C=image_token_position[:, 1])
        flat = hidden.flatten(0, 1).index_copy(0, image_token_index, embedded.to(hidden.dtype))
        return flat.view_as(hidden)

    def _head_input(self, hidden_SBH: Tensor) -> Tensor:
        """``[S, B, H]`` -> ``[R * B, H]`` on every tensor-parallel rank, gradients summed on the way back."""
        if self.config.sequence_parallel:
            sequence = tensor_parallel.gather_from_sequence_parallel_region(hidden_SBH, group=self.pg_collection.tp)
        else:
            sequence = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_SBH, group=self.pg_collection.tp)
        return sequence.flatten(0, 1)


def _forgive_missing_extra_state(_module: LanguageModule, incompatible_keys) -> None:
    """Lets strict loading pass over what `sharded_state_dict` leaves out."""
    missing = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if "_extra_state" not in name]
