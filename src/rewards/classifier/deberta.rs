//! DeBERTa-v2 with a convolution beside its first layer (`conv_kernel_size`; He et al. 2021), as its large models have it.
//!
//! candle-transformers has the layers and no forward pass of the convolution. So the first layer and the others are loaded as two
//! encoders, and what stands between them is ours: the convolution reads the embeddings, and its activation is added to
//! the first layer's output before a norm.

use candle_core::{Module, Result, Tensor};
use candle_nn::{Conv1d, Conv1dConfig, LayerNorm, Linear, VarBuilder, conv1d, layer_norm, linear};
use candle_transformers::models::debertav2::{Config, DebertaV2ContextPooler, DebertaV2Embeddings, DebertaV2Encoder};

/// A sequence classifier with one label.
pub(super) struct ConvDeberta {
    embeddings: DebertaV2Embeddings,
    first: DebertaV2Encoder,
    convolution: Convolution,
    /// The layers after the first, where there are any.
    rest: Option<DebertaV2Encoder>,
    pooler: DebertaV2ContextPooler,
    classifier: Linear,
}

struct Convolution {
    conv: Conv1d,
    activation: Activation,
    norm: LayerNorm,
}

/// What follows the convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activation {
    Tanh,
    Gelu,
    Relu,
}

impl Activation {
    /// Returns the activation of a config's `conv_act`; nothing where it is none that is known.
    pub(super) fn named(name: Option<&str>) -> Option<Self> {
        match name.unwrap_or("tanh") {
            "tanh" => Some(Activation::Tanh),
            "gelu" => Some(Activation::Gelu),
            "relu" => Some(Activation::Relu),
            _ => None,
        }
    }

    fn forward(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Activation::Tanh => x.tanh(),
            Activation::Gelu => x.gelu_erf(),
            Activation::Relu => x.relu(),
        }
    }
}

impl ConvDeberta {
    /// Loads the model; `vars` are those of the whole file.
    pub(super) fn load(vars: &VarBuilder, config: &Config, activation: Activation) -> Result<Self> {
        let width = config.hidden_size;
        let of_layers = |layers| Config { num_hidden_layers: layers, conv_kernel_size: None, ..config.clone() };
        let encoder = "deberta.encoder";
        let rest = config.num_hidden_layers.saturating_sub(1);
        let later = vars.clone().rename_f(a_layer_later);
        let kernel = config.conv_kernel_size.unwrap_or(3);
        let shape = Conv1dConfig {
            padding: kernel.saturating_sub(1) / 2,
            groups: config.conv_groups.unwrap_or(1),
            ..Conv1dConfig::default()
        };
        let conv = vars.pp(encoder).pp("conv");
        let pooled = config.pooler_hidden_size.unwrap_or(width);
        Ok(ConvDeberta {
            embeddings: DebertaV2Embeddings::load(vars.pp("deberta.embeddings"), config)?,
            first: DebertaV2Encoder::load(vars.pp(encoder), &of_layers(1))?,
            convolution: Convolution {
                conv: conv1d(width, width, kernel, shape, conv.pp("conv"))?,
                activation,
                norm: layer_norm(width, config.layer_norm_eps, conv.pp("LayerNorm"))?,
            },
            rest: (rest > 0).then(|| DebertaV2Encoder::load(later.pp(encoder), &of_layers(rest))).transpose()?,
            pooler: DebertaV2ContextPooler::load(vars.clone(), config)?,
            classifier: linear(pooled, 1, vars.pp("classifier"))?,
        })
    }

    /// Returns the score of one text, which has no padding: the convolution would read it.
    pub(super) fn forward(&self, ids: &Tensor, types: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let embedded = self.embeddings.forward(Some(ids), Some(types), None, Some(mask), None)?;
        let first = self.first.forward(&embedded, mask, None, None)?;
        let mut states = self.convolution.forward(&embedded, &first)?;
        if let Some(rest) = &self.rest {
            states = rest.forward(&states, mask, None, None)?;
        }
        self.classifier.forward(&self.pooler.forward(&states)?)
    }
}

impl Convolution {
    fn forward(&self, embedded: &Tensor, first: &Tensor) -> Result<Tensor> {
        let across = self.conv.forward(&embedded.transpose(1, 2)?.contiguous()?)?;
        let added = self.activation.forward(&across.transpose(1, 2)?.contiguous()?)?;
        self.norm.forward(&(first + added)?)
    }
}

/// Returns the name under which the file has what the second encoder asks for: its layer 0 is the model's layer 1.
fn a_layer_later(name: &str) -> String {
    const LAYER: &str = "deberta.encoder.layer.";
    let number_and_rest = name.strip_prefix(LAYER).and_then(|rest| rest.split_once('.'));
    match number_and_rest.and_then(|(number, rest)| Some((number.parse::<usize>().ok()?, rest))) {
        Some((number, rest)) => format!("{LAYER}{}.{rest}", number + 1),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_encoder_reads_the_layers_after_the_first() {
        assert_eq!(
            a_layer_later("deberta.encoder.layer.9.output.dense.bias"),
            "deberta.encoder.layer.10.output.dense.bias"
        );
        assert_eq!(a_layer_later("deberta.encoder.LayerNorm.weight"), "deberta.encoder.LayerNorm.weight");
        assert_eq!(Activation::named(None), Some(Activation::Tanh));
        assert_eq!(Activation::named(Some("mish")), None);
    }
}
