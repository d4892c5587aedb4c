//! GGUF files as llama.cpp's converter writes them, against the folders that they would be made from.

use candle_core::Tensor;
use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use serde_json::Value;

use super::*;
use crate::engine::gguf::Gguf;

/// Writes a tiny model as llama.cpp's converter does: its own names, interleaved query and key rows, its tokenizer.
pub(crate) fn write_gguf(model: &Model, architecture: &str, dtype: GgmlDType, path: &Path) {
    let (c, w) = (model.config(), model.weights());
    let permuted = matches!(architecture, "llama" | "smollm3");
    let interleave = |t: &Tensor, heads: usize| {
        if !permuted {
            return t.clone();
        }
        let (rows, columns) = t.dims2().unwrap();
        let split = t.reshape((heads, 2, rows / heads / 2, columns)).unwrap();
        split.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, columns)).unwrap()
    };
    let mut tensors =
        vec![("token_embd".to_string(), w.embed.tensor().unwrap()), ("output_norm".to_string(), w.norm.clone())];
    for (i, l) in w.layers.iter().enumerate() {
        let [q, k, v, o, gate, up, down] =
            [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down].map(|held| held.tensor().unwrap());
        let (q, k) = (interleave(&q, c.heads), interleave(&k, c.kv_heads));
        let fused = c.block.projections == Projections::Fused;
        let join = |parts: &[&Tensor]| fused.then(|| Tensor::cat(parts, 0).unwrap());
        let (qkv, gate_up) = (join(&[&q, &k, &v]), join(&[&gate, &up]));
        let split = (!fused).then_some(());
        let parts = [
            ("attn_norm", l.attn_norm.as_ref()),
            ("attn_q", split.map(|()| &q)),
            ("attn_k", split.map(|()| &k)),
            ("attn_v", split.map(|()| &v)),
            ("attn_qkv", qkv.as_ref()),
            ("attn_q_norm", l.q_norm.as_ref()),
            ("attn_k_norm", l.k_norm.as_ref()),
            ("attn_output", Some(&o)),
            ("post_attention_norm", l.attn_post_norm.as_ref()),
            ("ffn_norm", l.mlp_norm.as_ref()),
            ("ffn_gate", split.map(|()| &gate)),
            ("ffn_up", split.map(|()| &up).or(gate_up.as_ref())),
            ("ffn_down", Some(&down)),
            ("post_ffw_norm", l.mlp_post_norm.as_ref()),
        ];
        let parts = parts.into_iter().filter_map(|(name, t)| Some((format!("blk.{i}.{name}"), t?.clone())));
        tensors.extend(parts);
    }
    if let RopeScaling::Divisors { divisors, .. } = &c.ropes[0].scaling {
        let divisors = Tensor::new(divisors.as_slice(), w.norm.device()).unwrap();
        tensors.push(("rope_factors_short".to_string(), divisors));
    }
    if !c.tied {
        tensors.push(("output".to_string(), w.lm_head.tensor().unwrap()));
    }
    let quantise = |t: &Tensor| QTensor::quantize(t, if t.rank() == 1 { GgmlDType::F32 } else { dtype }).unwrap();
    let tensors: Vec<_> = tensors.iter().map(|(name, t)| (format!("{name}.weight"), quantise(t))).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
    let metadata = gguf_metadata(c, architecture);
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

fn gguf_metadata(c: &ModelConfig, architecture: &str) -> Vec<(String, gguf_file::Value)> {
    use gguf_file::Value as V;
    let read = |name: &str| -> Value {
        serde_json::from_slice(&std::fs::read(fixture("tiny-llama").join(name)).unwrap()).unwrap()
    };
    let (tokenizer, described) = (read("tokenizer.json"), read("tokenizer_config.json"));
    let text = |v: &Value| V::String(v.as_str().unwrap().to_string());
    let mut tokens = vec![V::U32(0); c.vocab];
    for (token, id) in tokenizer["model"]["vocab"].as_object().unwrap() {
        tokens[id.as_u64().unwrap() as usize] = V::String(token.clone());
    }
    let merge = |m: &Value| V::String(format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap()));
    let merges = tokenizer["model"]["merges"].as_array().unwrap().iter().map(merge).collect();
    let kinds = (0..c.vocab).map(|id| V::I32(if id < 3 { 3 } else { 1 })).collect();
    let own = [
        ("block_count", V::U32(c.layers.len() as u32)),
        ("context_length", V::U32(c.max_positions as u32)),
        ("embedding_length", V::U32(c.hidden_size as u32)),
        ("feed_forward_length", V::U32(c.intermediate_size as u32)),
        ("attention.head_count", V::U32(c.heads as u32)),
        ("attention.head_count_kv", V::U32(c.kv_heads as u32)),
        ("attention.layer_norm_rms_epsilon", V::F32(c.rms_eps as f32)),
        ("rope.freq_base", V::F32(c.ropes[0].theta as f32)),
    ];
    let shared = [
        ("general.architecture", V::String(architecture.to_string())),
        ("tokenizer.ggml.model", V::String("gpt2".to_string())),
        ("tokenizer.ggml.pre", V::String("gpt-2".to_string())),
        ("tokenizer.ggml.tokens", V::Array(tokens)),
        ("tokenizer.ggml.merges", V::Array(merges)),
        ("tokenizer.ggml.token_type", V::Array(kinds)),
        ("tokenizer.ggml.bos_token_id", V::U32(0)),
        ("tokenizer.ggml.eos_token_id", V::U32(2)),
        ("tokenizer.chat_template", text(&described["chat_template"])),
    ];
    let mut own = own.to_vec();
    if let RopeScaling::Divisors { attention, .. } = &c.ropes[0].scaling {
        own.push(("rope.scaling.attn_factor", V::F32(*attention)));
        own.push(("rope.scaling.original_context_length", V::U32(c.max_positions as u32)));
        own.push(("rope.dimension_count", V::U32(c.ropes[0].dim as u32)));
        own.push(("attention.sliding_window", V::U32(c.layers[0].window.unwrap_or(0) as u32)));
    }
    if architecture.starts_with("gemma") {
        own.push(("attention.key_length", V::U32(c.head_dim as u32)));
        own.push(("attention.sliding_window", V::U32(c.layers[0].window.unwrap_or(0) as u32)));
    }
    for (key, cap) in [("attn_logit_softcapping", c.scores.cap), ("final_logit_softcapping", c.logit_cap)] {
        own.extend(cap.map(|cap| (key, V::F32(cap))));
    }
    if let RopeScaling::Linear { factor } = c.ropes[0].scaling {
        own.push(("rope.scaling.type", V::String("linear".to_string())));
        own.push(("rope.scaling.factor", V::F32(factor as f32)));
    }
    let own = own.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value));
    own.chain(shared.map(|(key, value)| (key.to_string(), value))).collect()
}

/// Returns a copy of a tiny model whose `config.json` has one text in place of another.
pub(super) fn changed(name: &str, folder: &Path, from: &str, to: &str) -> Model {
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let config = folder.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    assert!(text.contains(from), "{name}: {from}");
    std::fs::write(&config, text.replace(from, to)).unwrap();
    load(folder)
}

#[test]
fn a_gguf_gives_what_the_folder_gives() {
    let folder = tempfile::tempdir().unwrap();
    // The metadata below say nothing of a stretched rotary embedding.
    let model = changed("tiny-llama", folder.path(), "\"llama3\"", "\"default\"");
    let case = &golden("tiny-llama")[1];
    let expected = logprobs(&model, None, &[case.item()]).unwrap();
    let path = folder.path().join("tiny.gguf");
    let kinds = [
        (GgmlDType::F32, 1e-6),
        (GgmlDType::F16, 1e-3),
        (GgmlDType::Q8_0, 0.1),
        (GgmlDType::Q4_1, 3.0),
        (GgmlDType::Q4_0, 3.0),
    ];
    for (dtype, tolerance) in kinds {
        write_gguf(&model, "llama", dtype, &path);
        let read = load(&path);
        assert_eq!(read.prompt_ids(&case.messages, case.tools.as_ref()).unwrap(), case.prompt_ids);
        assert_eq!(read.tokenizer().closing_id(), Some(2));
        let off = worst(&logprobs(&read, None, &[case.item()]).unwrap()[0], &expected[0]);
        assert!(off < tolerance, "{dtype:?}: {off}");
    }
}

#[test]
fn a_gguf_of_each_family_gives_what_its_folder_gives() {
    // llama.cpp's SmolLM3 has a rotary embedding in the first three layers.
    let families = [
        ("tiny-smollm3", "smollm3", "    0\n", "    1\n"),
        ("tiny-olmo2", "olmo2", "olmo2", "olmo2"),
        ("tiny-phi3", "phi3", "phi3", "phi3"),
        // llama.cpp's scales by the heads' width, and its Gemma 3 slides in the first five layers.
        ("tiny-gemma2", "gemma2", "\"query_pre_attn_scalar\": 24", "\"query_pre_attn_scalar\": 20"),
        ("tiny-gemma3", "gemma3", "\"full_attention\"\n", "\"sliding_attention\"\n"),
    ];
    for (name, architecture, from, to) in families {
        let folder = tempfile::tempdir().unwrap();
        let mut model = changed(name, folder.path(), from, to);
        if name == "tiny-gemma3" {
            let config = folder.path().join("config.json");
            let text = std::fs::read_to_string(&config).unwrap();
            let scalar = "\"query_pre_attn_scalar\": ";
            std::fs::write(&config, text.replace(&format!("{scalar}24"), &format!("{scalar}20"))).unwrap();
            model = load(folder.path());
        }
        let case = &golden("tiny-llama")[1];
        let path = folder.path().join("tiny.gguf");
        write_gguf(&model, architecture, GgmlDType::F32, &path);
        let [found, expected] = [&load(&path), &model].map(|m| logprobs(m, None, &[case.item()]).unwrap());
        let off = worst(&found[0], &expected[0]);
        assert!(off < 1e-6, "{name}: {off}");
    }
}

/// Numbers of layers tell llama.cpp the size of a Gemma, and its code the layers that slide.
#[test]
fn a_gguf_of_gemma_slides_and_scales_as_llama_cpp_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    let read = |name: &str, architecture: &str, layers: u32| {
        let mut metadata = gguf_metadata(load(&fixture(name)).config(), architecture);
        let count = metadata.iter_mut().filter(|(key, _)| key.ends_with("block_count"));
        count.for_each(|(_, n)| *n = gguf_file::Value::U32(layers));
        let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        gguf_file::write(&mut std::fs::File::create(&path).unwrap(), &metadata, &[]).unwrap();
        Gguf::open(&path).unwrap().config().unwrap()
    };
    let whole = |config: &ModelConfig| -> Vec<usize> {
        (0..config.layers.len()).filter(|i| config.layers[*i].window.is_none()).collect()
    };
    let (two, three) = (read("tiny-gemma2", "gemma2", 5), read("tiny-gemma3", "gemma3", 13));
    assert_eq!((whole(&two), whole(&three)), (vec![1, 3], vec![5, 11]));
    assert!(three.layers.iter().all(|layer| layer.rope == Some(usize::from(layer.window.is_some()))));
    assert_eq!((two.scores.cap, two.logit_cap, three.scores.cap), (Some(4.0), Some(6.0), None));
    let scale = |config: &ModelConfig| 1.0 / (config.scores.scale * config.scores.scale);
    let large = read("tiny-gemma2", "gemma2", 46);
    assert!((scale(&two) - 20.0).abs() < 1e-3, "{}", scale(&two));
    assert!((scale(&large) - (large.hidden_size / large.heads) as f32).abs() < 1e-3, "{}", scale(&large));
}

#[test]
fn every_fourth_layer_of_a_smollm3_gguf_has_no_rotary_embedding() {
    let folder = tempfile::tempdir().unwrap();
    let (model, path) = (load(&fixture("tiny-smollm3")), folder.path().join("tiny.gguf"));
    let mut metadata = gguf_metadata(model.config(), "smollm3");
    metadata
        .iter_mut()
        .filter(|(key, _)| key.ends_with("block_count"))
        .for_each(|(_, n)| *n = gguf_file::Value::U32(9));
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    gguf_file::write(&mut std::fs::File::create(&path).unwrap(), &metadata, &[]).unwrap();
    let layers = Gguf::open(&path).unwrap().config().unwrap().layers;
    let without: Vec<usize> = (0..9).filter(|i| layers[*i].rope.is_none()).collect();
    assert_eq!(without, [3, 7]);
}

#[test]
fn a_broken_gguf_is_refused_with_the_file_and_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let model = load(&fixture("tiny-llama"));
    let path = folder.path().join("tiny.gguf");
    let error = || Model::load(&path.display().to_string()).unwrap_err().to_string();
    write_gguf(&model, "falcon", GgmlDType::F32, &path);
    let known = "llama, mistral, qwen2, qwen3, smollm3, olmo2, phi3, gemma2, gemma3";
    assert!(error().contains("architecture falcon is not supported") && error().contains(known), "{}", error());
    write_gguf(&model, "llama", GgmlDType::F32, &path);
    let whole = std::fs::read(&path).unwrap();
    for keep in [whole.len() - 100, 5000, 10] {
        std::fs::write(&path, &whole[..keep]).unwrap();
        assert!(error().contains("tiny.gguf") && error().contains("download"), "{}", error());
    }
}
