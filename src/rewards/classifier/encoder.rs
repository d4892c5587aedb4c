//! Encoders that read a question and an answer together and give one number: BERT, RoBERTa, DeBERTa-v2 and -v3, ModernBERT.
//!
//! The layers are candle-transformers'. The heads of BERT (it has none for classification there) and of ModernBERT (there
//! a softmax follows, which makes every single score 1) are ours. Pairs are tokenised and cut as transformers does it
//! with `truncation=True`: the longer of the two loses its last tokens first.

use std::path::{Path, PathBuf};

use candle_core::{D, DType, Device, IndexOp, Module, Tensor};
use candle_nn::{LayerNorm, Linear, VarBuilder, layer_norm_no_bias, linear, linear_no_bias};
use candle_transformers::models::bert::{self, BertModel};
use candle_transformers::models::debertav2::{self, DebertaV2SeqClassificationModel};
use candle_transformers::models::modernbert::{self, ModernBert};
use candle_transformers::models::xlm_roberta::{self, XLMRobertaForSequenceClassification};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tokenizers::{EncodeInput, Encoding, Tokenizer, TruncationParams};

use super::ClassifierError;
use super::deberta::{Activation, ConvDeberta};
use crate::durable;

/// Cells of one padded batch.
const BATCH: usize = 2048;

/// The `model_type`s that are read here.
pub(super) const FAMILIES: [&str; 5] = ["bert", "roberta", "xlm-roberta", "deberta-v2", "modernbert"];

/// A loaded cross-encoder.
pub(super) struct Encoder {
    body: Body,
    tokenizer: Tokenizer,
    padding: u32,
    pub(super) max_tokens: usize,
    pub(super) sha256: String,
}

enum Body {
    Bert { model: BertModel, pooler: Linear, classifier: Linear },
    Roberta(XLMRobertaForSequenceClassification),
    Deberta(Box<DebertaV2SeqClassificationModel>),
    ConvDeberta(Box<ConvDeberta>),
    ModernBert { model: ModernBert, pooling: Pooling, dense: Linear, norm: LayerNorm, classifier: Linear },
}

/// Which state of ModernBERT's last layer its head reads.
enum Pooling {
    First,
    Mean,
}

impl Encoder {
    /// Loads the folder; `max_tokens` of 0 stands for the model's own limit.
    pub(super) fn load(folder: &Path, config: &Value, max_tokens: usize) -> Result<Self, ClassifierError> {
        let tokenizer_path = folder.join("tokenizer.json");
        let mut tokenizer =
            Tokenizer::from_file(&tokenizer_path).map_err(|e| ClassifierError::load(&tokenizer_path, e))?;
        let longest = longest(folder, config)?;
        let max_tokens = if max_tokens == 0 { longest } else { max_tokens.min(longest) };
        let truncation = TruncationParams { max_length: max_tokens, ..Default::default() };
        let cut = tokenizer.with_truncation(Some(truncation));
        cut.map_err(|e| ClassifierError::load(&tokenizer_path, e))?;
        tokenizer.with_padding(None);

        let path = weights_file(folder)?;
        let bytes = std::fs::read(&path).map_err(|e| ClassifierError::load(&path, e))?;
        let sha256 = hex::encode(Sha256::digest(&bytes));
        let weights = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu);
        let body =
            weights.map_err(|e| ClassifierError::load(&path, e)).and_then(|vars| Body::load(folder, config, vars))?;
        let padding = config["pad_token_id"].as_u64().unwrap_or(0) as u32;
        Ok(Encoder { body, tokenizer, padding, max_tokens, sha256 })
    }

    /// Returns the raw score of each (question, answer). An empty answer is no second text, as in transformers.
    pub(super) fn score_pairs(&self, pairs: &[(String, String)]) -> Result<Vec<f32>, ClassifierError> {
        self.score(pairs.iter().map(|(question, answer)| match answer.as_str() {
            "" => question.as_str().into(),
            answer => (question.as_str(), answer).into(),
        }))
    }

    /// Returns the raw score of each text, read alone.
    pub(super) fn score_texts(&self, texts: &[&str]) -> Result<Vec<f32>, ClassifierError> {
        self.score(texts.iter().map(|text| (*text).into()))
    }

    /// Texts of like length share a batch, so that little is padded.
    fn score<'s>(&self, inputs: impl Iterator<Item = EncodeInput<'s>>) -> Result<Vec<f32>, ClassifierError> {
        let encode = |input| self.tokenizer.encode(input, true).map_err(|e| ClassifierError::Tokenize(e.to_string()));
        let encodings: Vec<Encoding> = inputs.map(encode).collect::<Result<_, _>>()?;
        let mut order: Vec<usize> = (0..encodings.len()).collect();
        order.sort_by_key(|&i| (encodings[i].len(), i));
        let mut scores = vec![0.0; encodings.len()];
        let mut rest = order.as_slice();
        while !rest.is_empty() {
            let fits = |n: &usize| *n <= self.body.rows() && n * encodings[rest[n - 1]].len() <= BATCH;
            let (batch, tail) = rest.split_at((2..=rest.len()).take_while(fits).last().unwrap_or(1));
            rest = tail;
            let rows: Vec<&Encoding> = batch.iter().map(|&i| &encodings[i]).collect();
            let forward =
                self.forward(&rows).map_err(|source| ClassifierError::Forward { texts: rows.len(), source })?;
            batch.iter().zip(forward).for_each(|(&i, score)| scores[i] = score);
        }
        Ok(scores)
    }

    fn forward(&self, rows: &[&Encoding]) -> candle_core::Result<Vec<f32>> {
        let width = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        let tensor = |values: &dyn Fn(&Encoding) -> Vec<u32>, padding: u32| {
            let mut cells = Vec::with_capacity(rows.len() * width);
            for (at, row) in rows.iter().enumerate() {
                cells.extend(values(row));
                cells.resize((at + 1) * width, padding);
            }
            Tensor::from_vec(cells, (rows.len(), width), &Device::Cpu)
        };
        let ids = tensor(&|row| row.get_ids().to_vec(), self.padding)?;
        let types = tensor(&|row| row.get_type_ids().to_vec(), 0)?;
        let mask = tensor(&|row| vec![1; row.len()], 0)?;
        self.body.forward(&ids, &types, &mask)?.flatten_all()?.to_vec1()
    }
}

impl Body {
    fn load(folder: &Path, config: &Value, vars: VarBuilder) -> Result<Self, ClassifierError> {
        let kind = config["model_type"].as_str().unwrap_or_default();
        let width = config["hidden_size"].as_u64().unwrap_or(0) as usize;
        let body = match kind {
            "bert" => {
                let shape: bert::Config = shape(
                    folder,
                    config,
                    json!({ "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "type_vocab_size": 2, "pad_token_id": 0 }),
                )?;
                BertModel::load(vars.pp("bert"), &shape).and_then(|model| {
                    let pooler = linear(width, width, vars.pp("bert.pooler.dense"))?;
                    Ok(Body::Bert { model, pooler, classifier: linear(width, 1, vars.pp("classifier"))? })
                })
            }
            "deberta-v2" => {
                let defaults = json!({
                    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02,
                    "layer_norm_eps": 1e-7, "type_vocab_size": 0, "relative_attention": false, "max_relative_positions": -1,
                    "position_biased_input": true, "pos_att_type": [], "pooler_dropout": 0.0, "pooler_hidden_act": "gelu",
                    "pooler_hidden_size": width,
                });
                let mut shape: debertav2::Config = shape(folder, config, defaults)?;
                (shape.id2label, shape.label2id) = (None, None);
                if let Some(width) = shape.conv_kernel_size.filter(|width| *width > 0) {
                    let refuse = |problem: String| ClassifierError::load(&folder.join("config.json"), problem);
                    if width.is_multiple_of(2) {
                        return Err(refuse(format!(
                            "conv_kernel_size {width} is even, and would change a text's length"
                        )));
                    }
                    let activation = Activation::named(shape.conv_act.as_deref()).ok_or_else(|| {
                        refuse(format!("conv_act {} is not one of tanh, gelu, relu", config["conv_act"]))
                    })?;
                    ConvDeberta::load(&vars, &shape, activation).map(|model| Body::ConvDeberta(Box::new(model)))
                } else {
                    let label = std::collections::HashMap::from([(0, "score".to_owned())]);
                    DebertaV2SeqClassificationModel::load(vars.pp("deberta"), &shape, Some(label))
                        .map(|model| Body::Deberta(Box::new(model)))
                }
            }
            "modernbert" => Self::load_modernbert(folder, config, vars, width)?,
            _ => {
                let defaults = json!({ "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "position_embedding_type": "absolute", "layer_norm_eps": 1e-12, "pad_token_id": 1, "type_vocab_size": 2 });
                let shape: xlm_roberta::Config = shape(folder, config, defaults)?;
                XLMRobertaForSequenceClassification::new(1, &shape, vars).map(Body::Roberta)
            }
        };
        body.map_err(|e| ClassifierError::load(&folder.join("model.safetensors"), e))
    }

    /// Reads ModernBERT, whose rotary bases transformers 5 moved into `rope_parameters`.
    fn load_modernbert(
        folder: &Path,
        config: &Value,
        vars: VarBuilder,
        width: usize,
    ) -> Result<candle_core::Result<Self>, ClassifierError> {
        let refuse = |problem: String| ClassifierError::load(&folder.join("config.json"), problem);
        for (key, built) in [("hidden_activation", "gelu"), ("classifier_activation", "gelu")] {
            if let Some(other) = config[key].as_str().filter(|found| *found != built) {
                return Err(refuse(format!("{key} {other} is not {built}")));
            }
        }
        for key in ["attention_bias", "mlp_bias", "norm_bias", "classifier_bias"] {
            if config[key].as_bool() == Some(true) {
                return Err(refuse(format!("{key} is true, which no published ModernBERT has")));
            }
        }
        let pooling = match config["classifier_pooling"].as_str().unwrap_or("cls") {
            "cls" => Pooling::First,
            "mean" => Pooling::Mean,
            other => return Err(refuse(format!("classifier_pooling {other} is not one of cls, mean"))),
        };
        let theta = |kind: &str, key: &str, absent: f64| {
            let found = config["rope_parameters"][kind]["rope_theta"].as_f64().or(config[key].as_f64());
            found.unwrap_or(absent)
        };
        let every = config["global_attn_every_n_layers"].as_u64().unwrap_or(3);
        let layers = config["layer_types"].as_array().map(Vec::as_slice).unwrap_or_default();
        let expected =
            |i: usize| if (i as u64).is_multiple_of(every.max(1)) { "full_attention" } else { "sliding_attention" };
        if let Some(odd) = (0..layers.len()).find(|i| layers[*i] != expected(*i)) {
            return Err(refuse(format!("layer_types[{odd}] is {}, not {}", layers[odd], expected(odd))));
        }
        let shape: modernbert::Config = shape(
            folder,
            config,
            json!({
                "layer_norm_eps": config["norm_eps"].as_f64().unwrap_or(1e-5), "pad_token_id": 50283,
                "global_attn_every_n_layers": every, "local_attention": 128,
                "global_rope_theta": theta("full_attention", "global_rope_theta", 160_000.0),
                "local_rope_theta": theta("sliding_attention", "local_rope_theta", 10_000.0),
            }),
        )?;
        let eps = shape.layer_norm_eps;
        Ok(ModernBert::load(vars.clone(), &shape).and_then(|model| {
            let dense = linear_no_bias(width, width, vars.pp("head.dense"))?;
            let norm = layer_norm_no_bias(width, eps, vars.pp("head.norm"))?;
            let classifier = linear(width, 1, vars.pp("classifier"))?;
            Ok(Body::ModernBert { model, pooling, dense, norm, classifier })
        }))
    }

    /// Returns how many texts go through one pass at most.
    fn rows(&self) -> usize {
        match self {
            // candle-transformers adds the positions of DeBERTa-v2 to one text only, and a convolution would read padding.
            Body::Deberta(_) | Body::ConvDeberta(_) => 1,
            Body::Bert { .. } | Body::Roberta(_) | Body::ModernBert { .. } => BATCH,
        }
    }

    fn forward(&self, ids: &Tensor, types: &Tensor, mask: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Body::Bert { model, pooler, classifier } => {
                let first = model.forward(ids, types, Some(mask))?.i((.., 0))?.contiguous()?;
                classifier.forward(&pooler.forward(&first)?.tanh()?)
            }
            // RoBERTa was published with one type; what its tokenizer says of types is 0 throughout.
            Body::Roberta(model) => model.forward(ids, mask, &types.zeros_like()?),
            Body::Deberta(model) => model.forward(ids, Some(types.clone()), Some(mask.clone())),
            Body::ConvDeberta(model) => model.forward(ids, types, mask),
            Body::ModernBert { model, pooling, dense, norm, classifier } => {
                let states = model.forward(ids, mask)?;
                let pooled = match pooling {
                    Pooling::First => states.i((.., 0))?.contiguous()?,
                    Pooling::Mean => {
                        let mask = mask.to_dtype(DType::F32)?.unsqueeze(D::Minus1)?;
                        states.broadcast_mul(&mask)?.sum(1)?.broadcast_div(&mask.sum(1)?)?
                    }
                };
                classifier.forward(&norm.forward(&dense.forward(&pooled)?.gelu_erf()?)?)
            }
        }
    }
}

/// Reads a shape from `config.json`, with the defaults that transformers has for absent keys.
fn shape<T: DeserializeOwned>(folder: &Path, config: &Value, defaults: Value) -> Result<T, ClassifierError> {
    let mut whole: Map<String, Value> = defaults.as_object().cloned().unwrap_or_default();
    // Lists of labels have other types in some of candle's configs, and only one label is read anyway.
    let keys =
        config.as_object().into_iter().flatten().filter(|(key, _)| !matches!(key.as_str(), "id2label" | "label2id"));
    whole.extend(keys.filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), value.clone())));
    serde_json::from_value(Value::Object(whole)).map_err(|e| ClassifierError::load(&folder.join("config.json"), e))
}

/// Returns the longest input: what the positions allow, and what the tokenizer was published with.
fn longest(folder: &Path, config: &Value) -> Result<usize, ClassifierError> {
    let positions = config["max_position_embeddings"].as_u64().unwrap_or(512) as usize;
    // RoBERTa's positions begin after that of its padding.
    let positions = match config["model_type"].as_str() {
        Some("roberta" | "xlm-roberta") => {
            positions.saturating_sub(config["pad_token_id"].as_u64().unwrap_or(1) as usize + 1)
        }
        _ => positions,
    };
    let path = folder.join("tokenizer_config.json");
    let published = match durable::read_json::<Value>(&path) {
        Ok(value) => value["model_max_length"].as_u64(),
        Err(e) if e.is_not_found() => None,
        Err(e) => return Err(ClassifierError::load(&path, e)),
    };
    Ok(published.map_or(positions, |published| positions.min(usize::try_from(published).unwrap_or(positions))))
}

fn weights_file(folder: &Path) -> Result<PathBuf, ClassifierError> {
    let path = folder.join("model.safetensors");
    if path.is_file() {
        return Ok(path);
    }
    Err(ClassifierError::load(
        &path,
        "there is no such file; an encoder's weights stand in one safetensors file, never in a pickle",
    ))
}
