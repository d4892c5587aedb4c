//! The model's chat template, rendered as transformers renders it.
//!
//! Templates are Jinja written for Python: blocks are trimmed, Python's string and dict methods are there, `tojson`
//! spaces as Python's `json.dumps` does and escapes no HTML.

use std::io;

use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value as JinjaValue, context, filters};
use regex::Regex;
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};
use sha2::{Digest, Sha256};

use super::error::EngineError;
use super::source::Files;
use crate::json::Value;
use crate::record::Message;

const NAME: &str = "chat";

/// A compiled chat template with the special tokens it may print.
pub(crate) struct ChatTemplate {
    model: String,
    source: String,
    environment: Option<Environment<'static>>,
    bos: String,
    eos: String,
}

/// What templates take for now, where it is pinned.
static NOW: std::sync::OnceLock<chrono::DateTime<chrono::FixedOffset>> = std::sync::OnceLock::new();

/// Lets templates that write the date take this time for now, microseconds since the epoch, as long as the process lives: a
/// resumed round must read the same prompts.
pub fn pin_now(us: i64) {
    if let Some(at) = chrono::DateTime::from_timestamp_micros(us) {
        NOW.get_or_init(|| at.fixed_offset());
    }
}

impl ChatTemplate {
    /// Reads and compiles the template of a model. A model without one loads; rendering then says so.
    pub(crate) fn load(files: &Files, model: &str) -> Result<Self, EngineError> {
        let (source, bos, eos) = match files.gguf() {
            Some(gguf) => (gguf.text("tokenizer.chat_template"), gguf.special("bos"), gguf.special("eos")),
            None => in_folder(files)?,
        };
        Self::new(model, source, bos, eos)
    }

    fn new(model: &str, source: Option<String>, bos: Option<String>, eos: Option<String>) -> Result<Self, EngineError> {
        let fault = |e: Error| EngineError::Template { model: model.to_string(), problem: format!("{e:#}") };
        let environment = source.as_deref().map(compile).transpose().map_err(fault)?;
        let (bos, eos) = (bos.unwrap_or_default(), eos.unwrap_or_default());
        Ok(ChatTemplate { model: model.to_string(), source: source.unwrap_or_default(), environment, bos, eos })
    }

    /// Returns true where the model has one.
    pub(crate) fn is_there(&self) -> bool {
        self.environment.is_some()
    }

    pub(crate) fn sha256(&self) -> String {
        hex::encode(Sha256::digest(self.source.as_bytes()))
    }

    /// Returns the opening token that the template may write; empty where there is none.
    pub(crate) fn bos(&self) -> &str {
        &self.bos
    }

    /// Returns the text of a conversation.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        ending: Ending,
    ) -> Result<String, EngineError> {
        let fault = |problem: String| EngineError::Template { model: self.model.clone(), problem };
        let environment = self.environment.as_ref().ok_or_else(|| fault("the model has none".to_string()))?;
        let messages = messages.iter().map(plain).collect::<Result<Vec<_>, _>>().map_err(fault)?;
        let variables = context! {
            messages => messages.iter().map(to_jinja).collect::<Vec<_>>(),
            tools => tools.map(to_jinja),
            add_generation_prompt => ending == Ending::Opened,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        let template = environment.get_template(NAME).map_err(|e| fault(format!("{e:#}")))?;
        template.render(variables).map_err(|e| fault(format!("{e:#}")))
    }
}

/// How the text of a conversation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// With the opening of the assistant's turn, for an answer to follow.
    Opened,
    /// With the last message.
    Whole,
}

/// A template, the opening and the closing token, where a model has them.
type Found = (Option<String>, Option<String>, Option<String>);

/// Reads `chat_template.jinja`, or the template in `tokenizer_config.json`, and the special tokens.
fn in_folder(files: &Files) -> Result<Found, EngineError> {
    let config = files.json("tokenizer_config.json")?;
    let token = |key: &str| config[key].as_str().or(config[key]["content"].as_str()).map(str::to_string);
    let named =
        |list: &Vec<serde_json::Value>| list.iter().find(|t| t["name"] == "default").map(|t| t["template"].clone());
    let inside = match &config["chat_template"] {
        serde_json::Value::Array(list) => named(list).and_then(|t| t.as_str().map(str::to_string)),
        other => other.as_str().map(str::to_string),
    };
    let beside = std::fs::read_to_string(files.home().join("chat_template.jinja")).ok();
    Ok((beside.or(inside), token("bos_token"), token("eos_token")))
}

/// Returns a message as templates expect it: text parts joined, the arguments of tool calls as objects.
fn plain(message: &Message) -> Result<Value, String> {
    let mut message = message.clone();
    if let Value::Array(parts) = &message.content {
        if let Some(part) = parts.iter().find(|p| p["text"].as_str().is_none()) {
            return Err(format!("a content part of type {} is not text", part["type"]));
        }
        message.content = Value::String(message.plain_text());
    }
    if let Some(Value::Array(calls)) = message.rest.get_mut("tool_calls") {
        for call in calls {
            let parsed = call["function"]["arguments"].as_str().and_then(|text| serde_json::from_str(text).ok());
            if let (Some(arguments @ Value::Object(_)), Some(place)) = (parsed, call.pointer_mut("/function/arguments"))
            {
                *place = arguments;
            }
        }
    }
    serde_json::to_value(&message).map(Value::from).map_err(|e| e.to_string())
}

fn compile(source: &str) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |problem: String| -> Result<JinjaValue, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, problem))
    });
    environment.add_function("strftime_now", |format: String| -> Result<String, Error> {
        let now = NOW.get().copied().unwrap_or_else(|| chrono::Local::now().fixed_offset());
        let mut text = String::new();
        // Chrono's own `to_string` panics on a format that it does not know.
        std::fmt::Write::write_fmt(&mut text, format_args!("{}", now.format(&format)))
            .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("strftime_now cannot write {format:?}")))?;
        Ok(text)
    });
    environment.add_template_owned(NAME, without_generation(source))?;
    Ok(environment)
}

/// Returns the template without the block with which transformers marks what an assistant wrote (SmolLM3 has it): one
/// that always holds, so that white space is trimmed as it was.
fn without_generation(source: &str) -> String {
    let mut source = source.to_string();
    for (tag, by) in [("generation", "if true"), ("endgeneration", "endif")] {
        if let Ok(mark) = Regex::new(&format!(r"\{{%([-+]?)\s*{tag}\s*([-+]?)%\}}")) {
            source = mark.replace_all(&source, format!("{{%${{1}} {by} ${{2}}%}}")).into_owned();
        }
    }
    source
}

/// Returns JSON as Python writes it: `", "` and `": "` on one line, or indented.
fn to_json(value: JinjaValue, options: Kwargs) -> Result<JinjaValue, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // minijinja's own filter escapes for HTML; reading its JSON undoes that.
    let plain = filters::tojson(&value, None, Kwargs::from_iter::<[(String, JinjaValue); 0]>([]))?.to_string();
    let value: Value = serde_json::from_str(&plain).map_err(unwritable)?;
    let text = match indent {
        Some(width) => write_json(&value, PrettyFormatter::with_indent(" ".repeat(width).as_bytes())),
        None => write_json(&value, Spaced(CompactFormatter)),
    };
    Ok(JinjaValue::from_safe_string(text.map_err(unwritable)?))
}

fn unwritable(problem: serde_json::Error) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem.to_string())
}

/// Returns a JSON value as templates see it, its keys in order.
fn to_jinja(value: &Value) -> JinjaValue {
    match value {
        Value::Null => JinjaValue::from(()),
        Value::Bool(value) => JinjaValue::from(*value),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => JinjaValue::from(value),
            (None, Some(value)) => JinjaValue::from(value),
            (None, None) => JinjaValue::from(number.as_f64()),
        },
        Value::String(text) => JinjaValue::from(text.as_str()),
        Value::Array(items) => JinjaValue::from(items.iter().map(to_jinja).collect::<Vec<_>>()),
        Value::Object(fields) => JinjaValue::from_pairs(fields.iter().map(|(key, v)| (key.as_str(), to_jinja(v)))),
    }
}

fn write_json(value: &Value, formatter: impl Formatter) -> serde_json::Result<String> {
    let mut bytes = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The separators of Python's `json.dumps`.
struct Spaced(CompactFormatter);

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(
        source: &str,
        messages: serde_json::Value,
        tools: Option<serde_json::Value>,
    ) -> Result<String, EngineError> {
        let template = ChatTemplate::new("m", Some(source.into()), Some("<s>".into()), None).unwrap();
        let messages: Vec<Message> = serde_json::from_value(messages).unwrap();
        template.render(&messages, tools.map(Value::from).as_ref(), Ending::Opened)
    }

    #[test]
    fn blocks_are_trimmed_and_python_methods_work() {
        let source = "{{ bos_token }}{% for m in messages %}\n  {% if m.content.startswith('a') %}\n{{ m['role'].upper() }}:{{ m.content.strip() }}\n{% endif %}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}";
        let text = render(source, json!([{"role": "user", "content": "a <b> "}, {"role": "x", "content": "b"}]), None);
        assert_eq!(text.unwrap(), "<s>USER:a <b>\n>");
    }

    #[test]
    fn tools_are_written_as_python_writes_json() {
        let tools = json!([{"type": "function", "function": {"name": "f", "d": "it's <b> & é", "n": [1, 2.5]}}]);
        let text = render("{% for t in tools %}{{ t | tojson }}{% endfor %}", json!([]), Some(tools)).unwrap();
        let expected = r#"{"type": "function", "function": {"name": "f", "d": "it's <b> & é", "n": [1, 2.5]}}"#;
        assert_eq!(text, expected);
        let indented = render("{{ tools | tojson(indent=2) }}", json!([]), Some(json!({"a": 1}))).unwrap();
        assert_eq!(indented, "{\n  \"a\": 1\n}");
    }

    #[test]
    fn what_the_template_refuses_is_an_error_with_its_words() {
        let error = render("{{ raise_exception('roles must alternate') }}", json!([]), None).unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
        let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]);
        assert!(render("x", image, None).unwrap_err().to_string().contains("image_url"));
        let none = ChatTemplate::new("m", None, None, None).unwrap().render(&[], None, Ending::Opened).unwrap_err();
        assert!(none.to_string().contains("has none"), "{none}");
    }

    #[derive(serde::Deserialize)]
    struct Family {
        name: String,
        template: String,
        bos: String,
        eos: String,
        cases: Vec<Rendered>,
    }

    #[derive(serde::Deserialize)]
    struct Rendered {
        messages: Vec<Message>,
        tools: Option<Value>,
        /// None where transformers refuses the conversation.
        text: Option<String>,
    }

    /// Templates belong to their models: `tools/reference/template_golden.py` renders those of a folder.
    #[test]
    fn templates_render_as_in_transformers() {
        let Ok(path) = std::env::var("TAOD_TEMPLATES") else {
            println!("skipped: TAOD_TEMPLATES names no file of tools/reference/template_golden.py");
            return;
        };
        let families: Vec<Family> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let mut wrong = Vec::new();
        for Family { name, template, bos, eos, cases } in families {
            let template = ChatTemplate::new(&name, Some(template), Some(bos), Some(eos)).unwrap();
            for (i, case) in cases.into_iter().enumerate() {
                let found = template.render(&case.messages, case.tools.as_ref(), Ending::Opened);
                if found.as_ref().ok() != case.text.as_ref() {
                    wrong.push(format!("{name}, conversation {i}: {found:?}, transformers {:?}", case.text));
                }
            }
        }
        assert!(wrong.is_empty(), "{} conversations:\n{}", wrong.len(), wrong.join("\n"));
    }

    #[test]
    fn the_mark_of_generated_text_prints_nothing() {
        let source =
            "a\n  {% generation %}\n  b\n  {%- endgeneration -%}\n  c{% if add_generation_prompt %}>{% endif %}";
        assert_eq!(render(source, json!([]), None).unwrap(), "a\n  bc>");
    }

    #[test]
    fn arguments_of_tool_calls_become_objects() {
        let call = json!({"function": {"name": "f", "arguments": "{\"x\":1}"}});
        let messages = json!([{"role": "assistant", "content": null, "tool_calls": [call]}]);
        let source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}{{ messages[0].content is none }}";
        assert_eq!(render(source, messages, None).unwrap().to_lowercase(), "{\"x\": 1}true");
    }
}
