"""What the generic shrinker cannot tell from the names of fields."""

from __future__ import annotations

from typing import Any

from transformers import SiglipVisionConfig

# Values that replace defaults before numbers get small, where defaults leave out a kind of block.
BEFORE: dict[str, dict[str, Any]] = {
    # Experts beside the dense feed-forward block; "gemma4" has the dense one alone, as is the default of both.
    "gemma4_text": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 4, "moe_intermediate_size": 64},
}

SAM = {"output_channels": 8, "global_attn_indexes": [1], "window_size": 2}
VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
MIXED = ["dense", "sparse", "sparse"]
THREE = ["sliding_attention", "full_attention", "sliding_attention"]
HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]

# Stands in for vision towers that need timm: only the language side is of interest here.
VISION_VALUES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vocab_size": 8,
    "vocab_offset": 80,
    "rms_norm_eps": 1e-6,
    "model_args": {"embed_dim": 16},
}
VISION = SiglipVisionConfig(**VISION_VALUES)

FOUR = [1, 1, 1, 1]
TOKENIZER = {"num_filters": 4, "depths": [1, 1, 1], "downsampling_ratios": [2, 2]}
SWIN = {"depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "drop_path_rate": 0.0}
PYRAMID = {
    "hidden_sizes": [8, 16, 16, 24],
    "depths": FOUR,
    "num_attention_heads": [1, 2, 2, 2],
    "sr_ratios": [2, 2, 2, 1],
    "mlp_ratios": [3, 2, 2, 2],
    "drop_path_rate": 0.0,
}

# Values that replace what the shrinker gave, by the model type of the (nested) configuration.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "bit": {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": FOUR, "num_groups": 4},
    "big_bird": {"attention_type": "original_full"},
    "blip-2": {"image_token_index": 90},
    "blt": {"encoder_hash_byte_group_vocab": 32},
    "blt_local_decoder": {"hidden_size_global": 16},
    "blt_local_encoder": {"hidden_size_global": 16},
    "chameleon": {"vocabulary_map": {"<image>": 90, "IMGIMGA": 91, "IMGIMGB": 92}},
    "chameleon_vqgan": {**VQ, "latent_channels": 32, "embed_dim": 8, "num_embeddings": 8, "resolution": 16},
    "codegen": {"n_head": 4},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        }
    },
    "convnext": {"hidden_sizes": [8, 12, 16, 16], "depths": FOUR, "image_size": 64},
    "convnextv2": {"hidden_sizes": [8, 12, 16, 16], "depths": FOUR, "image_size": 64},
    "cvt": {"embed_dim": [8, 12, 16], "depth": [1, 2, 3], "num_heads": [1, 2, 2], "drop_path_rate": [0.0, 0.0, 0.0]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_sam_vision_model": {**SAM, "downsample_channels": [8, 16]},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": MIXED, "num_hidden_layers": 3},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "distilbert": {"dim": 16, "hidden_dim": 24},
    "donut-swin": SWIN,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"downsample_hidden_size": 4, "feature_size": 8},
    "dots3_note_text": {
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 14,
        "swa_kv_lora_rank": 10,
        "swa_head_dim": 10,
        "swa_qk_nope_head_dim": 6,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {"mlp_layer_types": MIXED, "num_hidden_layers": 3},
    "encoder-decoder": {"pad_token_id": 0, "decoder_start_token_id": 1},
    "esm": {"vocab_size": 96, "pad_token_id": 1, "mask_token_id": 4},
    "emu3": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 91, "<|visual token 000000|>": 92}},
    "emu3_vqgan": {**VQ, "codebook_size": 8, "temporal_downsample_factor": 2},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [20, 12],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [1, 1, 2]},
    },
    "falcon_h1": {"mamba_d_ssm": 16},
    "fast_vlm": {"vision_config": VISION},
    "focalnet": {"embed_dim": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "focal_levels": [2, 2], "image_size": 32},
    "fun_asr_nano": {
        "adaptor_config": {
            "hidden_size": 16,
            "intermediate_size": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "projector_hidden_size": 20,
        }
    },
    "gemma3n_audio": {"vocab_size": 8, "vocab_offset": 88},
    "gemma3n_text": {"vocab_size_per_layer_input": 80},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm4v_moe_text": {"head_dim": 16},
    "got_ocr2_vision": SAM,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "vision_config": {**CLIP, "hidden_size": 64},
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
    },
    "granitemoe_swa": {"shared_intermediate_size": 12},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "granitemoeshared": {"shared_intermediate_size": 12},
    "hiera": {
        "image_size": [32, 32],
        "patch_size": [7, 7],
        "embed_dim": 8,
        "depths": FOUR,
        "num_heads": [1, 1, 2, 2],
        "masked_unit_size": [8, 8],
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hunyuan_vl_vision": {"max_image_size": 32, "min_image_size": 16, "max_vit_seq_len": 16},
    "inkling2_text": {"rel_extent": 16, "d_rel": 4},
    "inkling2_vision": {"posemb_grid_size": 4, "projection_hidden_dim": 16},
    "inkling_audio": {"n_mel_bins": 4, "mel_vocab_size": 8},
    "inkling_text": {"rel_extent": 16, "d_rel": 4},
    "inkling_vision": {"num_hidden_layers": 4, "patch_size": 2},
    "instructblip": {"image_token_index": 90},
    "instructblipvideo": {"video_token_index": 90},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "janus_vqgan": {**VQ, "latent_channels": 32, "num_embeddings": 8},
    "jetmoe": {"kv_channels": 8},
    "laguna": {"layer_types": THREE},
    "led": {"attention_window": 12},
    "lfm2": {"intermediate_size": 36, "block_multiple_of": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "levit": {
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [8, 12, 16],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [4, 4, 4],
    },
    "llama4_text": {"moe_layers": [1, 2]},
    "longformer": {"attention_window": 12},
    "longcat_flash": {"head_dim": 4, "num_hidden_layers": 4},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "mellum": {"layer_types": THREE},
    "mimi": {"upsample_groups": 16, "num_filters": 4},
    "minicpm3": {"dim_model_base": 8},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "mobilevit": {
        "image_size": 64,
        "hidden_sizes": [8, 12, 16],
        "neck_hidden_sizes": [8, 8, 12, 12, 16, 16, 24],
        "expand_ratio": 1.0,
    },
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {
        "num_hidden_layers": 2,
        "patch_sizes": [4, 2],
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
    },
    "neomme": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        }
    },
    "perceiver": {
        "num_latents": 8,
        "d_latents": 16,
        "num_self_attends_per_block": 2,
        "max_position_embeddings": 16,
        "image_size": 8,
        "self_attention_widening_factor": 2,
        "cross_attention_widening_factor": 2,
    },
    "perception_lm": {"vision_config": VISION},
    "phi4_multimodal_audio": {
        "nemo_conv_channels": 8,
        "ext_pw_out_channel": 16,
        "depthwise_separable_out_channel": 16,
    },
    "pp_chart2table_vision": SAM,
    "pp_formulanet_vision": {
        **SAM,
        "post_conv_in_channels": 8,
        "post_conv_mid_channels": 8,
        "post_conv_out_channels": 16,
        "decoder_hidden_size": 16,
    },
    "pvt": {**{k: v for k, v in PYRAMID.items() if k != "sr_ratios"}, "image_size": 64, "patch_sizes": [4, 2, 2, 2]},
    "pvt_v2": {**PYRAMID, "image_size": 64},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 60, "vision_end_token_id": 61},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 60, "vision_end_token_id": 61},
    "qwen4_exp_text": INDEXER,
    "radio": {"max_img_size": 32},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 20},
    "reformer": {
        "hash_seed": 0,
        "num_buckets": 4,
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [6, 10],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "sam_vision_model": SAM,
    "segformer": {**PYRAMID, "decoder_hidden_size": 16},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6, "mm_tokens_per_image": 4},
    "squeezebert": {"embedding_size": 16},
    "step3p5": {"sliding_window": 8, "layer_types": THREE},
    "swin": SWIN,
    "swinv2": SWIN,
    "switch_transformers": {"num_experts": 2},
    "udop": {"decoder_start_token_id": 0},
    "unlimited_ocr_sam_vision_model": {**SAM, "downsample_channels": [8, 16]},
    "vibevoice_acoustic_tokenizer": TOKENIZER,
    "vibevoice_acoustic_tokenizer_decoder": TOKENIZER,
    "vibevoice_acoustic_tokenizer_encoder": TOKENIZER,
    "vision-encoder-decoder": {"pad_token_id": 0, "decoder_start_token_id": 1},
    "speech-encoder-decoder": {"pad_token_id": 0, "decoder_start_token_id": 1},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": HYBRID, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": HYBRID, "num_hidden_layers": 4},
}

# Values put into the finished configuration, past its checks.
AFTER: dict[str, dict[str, Any]] = {
    "gemma3n": {"vision_config": VISION},
    "cohere_asr": {"pad_token_id": 0, "decoder_start_token_id": 1},
    "longt5": {"decoder_start_token_id": 0},
    "moonshine": {"pad_token_id": 0},
    "moonshine_streaming": {"decoder_start_token_id": 1, "num_key_value_heads": 2},
    "pop2piano": {"decoder_start_token_id": 0},
    "switch_transformers": {"decoder_start_token_id": 0},
    "t5": {"decoder_start_token_id": 0},
}

# Values of the finished configuration that depend on the mapping, which names another class for the type.
FOR_MAPPING: dict[tuple[str, str], dict[str, Any]] = {
    ("masked-lm", "reformer"): {"is_decoder": False},
    ("text-encoding", "t5gemma"): {"is_encoder_decoder": False},
}

# Text models that take three kinds of positions and fall back on sections of frequencies for larger heads.
MROPE = {
    "glm46v_text",
    "glm4v_text",
    "glm4v_moe_text",
    "glm_ocr_text",
    "glmga_text",
    "paddleocr_vl_text",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "hunyuan_vl_text",
    "qwen2_5_omni_text",
}
