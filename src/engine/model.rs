//! A loaded model: weights, tokenizer and chat template, shared by everything that runs it.

use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use super::cache::Shape;
use super::config::ModelConfig;
use super::decoder::Decoder;
use super::device::{self, DeviceModel, Place};
use super::error::EngineError;
use super::grammar::Lexicon;
use super::held::Hold;
use super::matmul::WeightForm;
use super::rope::Rope;
use super::source::{Files, ModelSource};
use super::template::{ChatTemplate, Ending};
use super::tokenizer::Tokenizer;
use super::weights::{Output, Weights};
use crate::json::Value;
use crate::record::Message;

/// What names a model exactly, in manifests and adapters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelIdentity {
    /// Hub id, or the last part of the path.
    pub name: String,
    pub architecture: String,
    /// SHA-256 of the weight file, or of the hashes of all shards.
    pub sha256: String,
    pub tokenizer_sha256: String,
    pub template_sha256: String,
}

/// A loaded model. Cloning shares it.
#[derive(Clone)]
pub struct Model(Arc<Inner>);

struct Inner {
    config: ModelConfig,
    identity: ModelIdentity,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    weights: Weights,
    ropes: Vec<Rope>,
    /// The weights laid out for inference, made when first needed: training does without this second copy.
    decoder: OnceLock<Arc<Decoder>>,
    /// Made when a first answer is to keep a schema.
    lexicon: OnceLock<Arc<Lexicon>>,
    /// The weights on the device that computes, where that is not the processor.
    device: Option<Arc<DeviceModel>>,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Model").field(&self.0.identity).finish()
    }
}

impl Model {
    /// Loads a model as f32 on the CPU. `model` is a folder in Hugging Face layout, a `.gguf` file or a hub id.
    pub fn load(model: &str) -> Result<Self, EngineError> {
        Self::load_held(model, Hold::F32)
    }

    /// Does the same with the large matrices held as asked.
    pub fn load_held(model: &str, hold: Hold) -> Result<Self, EngineError> {
        Self::load_at(model, hold, None)
    }

    /// Loads a model to sample, score and train with where the settings say. On a device, what the processor keeps of it is
    /// held as the files store it.
    pub fn load_on(model: &str, hold: Hold, engine: &device::Settings) -> Result<Self, EngineError> {
        match engine.open()? {
            None => Self::load_held(model, hold),
            place => Self::load_at(model, Hold::Stored, place),
        }
    }

    /// Loads another model to where this one computes.
    pub fn load_beside(&self, model: &str) -> Result<Self, EngineError> {
        match &self.0.device {
            None => Self::load(model),
            Some(device) => Self::load_at(model, Hold::Stored, Some(device.place().clone())),
        }
    }

    pub(super) fn load_at(model: &str, hold: Hold, place: Option<Place>) -> Result<Self, EngineError> {
        let source = ModelSource::parse(model)?;
        let files = source.resolve()?;
        let config = files.config()?;
        Self::assemble(&source, &files, config, Output::Vocabulary, hold, place)
    }

    /// Builds a model of opened files, with a copy of its weights on a device where one is given.
    pub(super) fn assemble(
        source: &ModelSource,
        files: &Files,
        config: ModelConfig,
        output: Output,
        hold: Hold,
        place: Option<Place>,
    ) -> Result<Self, EngineError> {
        let tokenizer = Tokenizer::load(files)?;
        let template = ChatTemplate::load(files, &source.name())?;
        let identity = ModelIdentity {
            name: source.name(),
            architecture: config.architecture.as_str().to_string(),
            sha256: files.weights_sha256()?,
            tokenizer_sha256: tokenizer.sha256().to_string(),
            template_sha256: template.sha256(),
        };
        let weights = Weights::load(files, &config, output, hold)?;
        let ropes = Rope::all(&config)?;
        let device = place.map(|place| DeviceModel::new(&config, &weights, &ropes, place)).transpose()?.map(Arc::new);
        let (decoder, lexicon) = Default::default();
        Ok(Model(Arc::new(Inner { config, identity, tokenizer, template, weights, ropes, decoder, lexicon, device })))
    }

    /// Returns a model's shape without its weights, and how many bytes they take in its files. A folder may lack them.
    pub fn shape(model: &str) -> Result<(ModelConfig, Option<u64>), EngineError> {
        let source = ModelSource::parse(model)?;
        if let Some(config) = source.bare_config()? {
            return Ok((config, None));
        }
        let files = source.resolve()?;
        Ok((files.config()?, Some(files.bytes())))
    }

    /// Returns the shape and the constants.
    pub fn config(&self) -> &ModelConfig {
        &self.0.config
    }

    /// Returns the name and the hashes.
    pub fn identity(&self) -> &ModelIdentity {
        &self.0.identity
    }

    /// Returns the tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.0.tokenizer
    }

    /// Returns the frozen weights.
    pub fn weights(&self) -> &Weights {
        &self.0.weights
    }

    /// Returns the tables of the rotary embeddings.
    pub fn ropes(&self) -> &[Rope] {
        &self.0.ropes
    }

    /// Returns the weights on the device that computes; nothing where that is the processor.
    pub(crate) fn device(&self) -> Option<&Arc<DeviceModel>> {
        self.0.device.as_ref()
    }

    /// Returns where it computes and in which precision, where that is not the processor: what its numbers depend on besides it.
    pub fn computed_on(&self) -> Option<String> {
        self.device().map(|device| device.place().to_string())
    }

    /// Returns the layout of the pages of its cache.
    pub(crate) fn cache_shape(&self) -> Shape {
        self.device().map_or_else(|| Shape::new(self.config()), |device| Shape::on_device(device))
    }

    /// Returns the model laid out for inference in f32 on the processor.
    pub(crate) fn decoder(&self) -> Result<&Arc<Decoder>, EngineError> {
        if let Some(decoder) = self.0.decoder.get() {
            return Ok(decoder);
        }
        let decoder = Decoder::new(self.config(), self.weights(), self.ropes(), WeightForm::F32, None)?;
        Ok(self.0.decoder.get_or_init(|| Arc::new(decoder)))
    }

    /// Returns the tokenizer's tokens laid out for grammars.
    pub(crate) fn lexicon(&self) -> Result<&Arc<Lexicon>, EngineError> {
        if let Some(lexicon) = self.0.lexicon.get() {
            return Ok(lexicon);
        }
        let lexicon = Lexicon::new(self.tokenizer(), self.config().vocab)?;
        Ok(self.0.lexicon.get_or_init(|| Arc::new(lexicon)))
    }

    /// Returns the token ids of a conversation, ending where the assistant's answer begins.
    ///
    /// The chat template writes every special token itself, so the tokenizer adds none.
    pub fn prompt_ids(&self, messages: &[Message], tools: Option<&Value>) -> Result<Vec<u32>, EngineError> {
        let text = self.0.template.render(messages, tools, Ending::Opened)?;
        self.0.tokenizer.encode(&text)
    }

    /// Does the same for what a log holds: nothing where the template refuses it, because of an image or roles out of order.
    pub fn readable_ids(&self, messages: &[Message], tools: Option<&Value>) -> Result<Option<Vec<u32>>, EngineError> {
        match self.prompt_ids(messages, tools) {
            Err(EngineError::Template { .. }) if self.0.template.is_there() => Ok(None),
            ids => ids.map(Some),
        }
    }

    /// Returns the token ids of a whole conversation, its last answer included, as transformers tokenises the text of a
    /// template for a classifier: special tokens are added, and an opening token that the template wrote is not doubled.
    /// Those that stand in the messages are taken out.
    pub fn conversation_ids(&self, messages: &[Message]) -> Result<Vec<u32>, EngineError> {
        let defused = |message: &Message| {
            let content = Value::String(self.0.tokenizer.defuse(&message.plain_text()));
            Message { role: message.role.clone(), content, rest: message.rest.clone() }
        };
        let messages: Vec<Message> = messages.iter().map(defused).collect();
        let messages = messages.as_slice();
        let text = self.0.template.render(messages, None, Ending::Whole)?;
        let bos = self.0.template.bos();
        let text = text.strip_prefix(bos).filter(|_| !bos.is_empty()).unwrap_or(&text);
        self.0.tokenizer.encode_whole(text)
    }
}
