//! The OpenAPI document: what the routes say of themselves, in OpenAPI 3.1, whose schemas are JSON Schema as it is.

use schemars::generate::SchemaSettings;
use schemars::{Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::admin::access::Need;

/// What a route answers where all is well.
pub(super) enum Content {
    Json(Schema),
    /// The bytes of a file, with their hash in the headers.
    File,
}

/// One route as the document tells it.
pub(super) struct Operation {
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    pub(super) need: Need,
    pub(super) summary: &'static str,
    /// Schema of the query's parameters, as one object.
    pub(super) query: Option<Schema>,
    pub(super) body: Option<Schema>,
    pub(super) answer: Content,
    pub(super) status: u16,
}

/// The document while it is made.
pub(super) struct Document {
    generator: SchemaGenerator,
    operations: Vec<Operation>,
}

impl Document {
    pub(super) fn new() -> Self {
        let settings = SchemaSettings::draft2020_12().with(|settings| {
            settings.definitions_path = "/components/schemas".into();
            settings.meta_schema = None;
        });
        let settings = settings.for_serialize();
        Document { generator: settings.into_generator(), operations: Vec::new() }
    }

    pub(super) fn generator(&mut self) -> &mut SchemaGenerator {
        &mut self.generator
    }

    pub(super) fn add(&mut self, operation: Operation) {
        self.operations.push(operation);
    }

    /// Returns the whole document; every error is a `problem`.
    pub(super) fn finish(mut self, problem: &Schema) -> Value {
        let schemas = Value::Object(self.generator.take_definitions(true));
        let mut paths: Map<String, Value> = Map::new();
        for operation in &self.operations {
            let told = tell(operation, problem);
            let path = paths.entry(operation.path).or_insert_with(|| json!({}));
            path[operation.method] = told;
        }
        json!({
            "openapi": "3.1.0",
            "info": {
                "title": "taod",
                "version": env!("CARGO_PKG_VERSION"),
                "description": "What a taod daemon does, and what an operator may ask of it. On loopback figures need no token.",
                "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
            },
            "paths": paths,
            "components": {
                "schemas": schemas,
                "securitySchemes": { "token": { "type": "http", "scheme": "bearer" } },
            },
        })
    }
}

fn tell(operation: &Operation, problem: &Schema) -> Value {
    let mut parameters: Vec<Value> = operation
        .path
        .split('{')
        .skip(1)
        .filter_map(|rest| rest.split('}').next())
        .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }))
        .collect();
    parameters.extend(operation.query.iter().flat_map(query_parameters));
    let said = |words: &str, schema: &Schema| json!({ "description": words, "content": { "application/json": { "schema": schema } } });
    let answer = match &operation.answer {
        Content::Json(schema) => said("What was asked for", schema),
        Content::File => file(),
    };
    let mut responses = json!({
        operation.status.to_string(): answer,
        "401": said("Nobody knows who asks", problem),
        "403": said("The caller's role does not allow it", problem),
        "500": said("Something could not be read", problem),
        "503": said("It took too long", problem),
    });
    let more: &[(&str, &str)] = match operation.body {
        Some(_) => &[
            ("400", "The body is no JSON"),
            ("404", "There is no such thing"),
            ("409", "It cannot be taken up now"),
            ("413", "The body is too large"),
            ("415", "The body is not sent as application/json"),
            ("422", "The body does not fit its schema"),
        ],
        None => &[("400", "A parameter is unknown or does not fit"), ("404", "There is no such thing")],
    };
    more.iter().for_each(|(status, words)| responses[*status] = said(words, problem));
    let role = if operation.need == Need::Operate { "operate" } else { "read" };
    let open = operation.need == Need::Figures;
    let security = if open { json!([{}, { "token": [] }]) } else { json!([{ "token": [] }]) };
    let loopback = if open { "; none on loopback" } else { "" };
    let mut told = json!({
        "summary": operation.summary,
        "description": format!("Needs the role `{role}`{loopback}."),
        "parameters": parameters,
        "responses": responses,
        "security": security,
    });
    if let Some(body) = &operation.body {
        told["requestBody"] = json!({ "required": true, "content": { "application/json": { "schema": body } } });
    }
    told
}

/// Tells of an answer that is a file.
fn file() -> Value {
    let header = |words: &str| json!({ "description": words, "required": true, "schema": { "type": "string" } });
    json!({
        "description": "The file's bytes",
        "headers": {
            "etag": header("The SHA-256 of the bytes in hex, in quotes"),
            "repr-digest": header("The same as RFC 9530 writes it: `sha-256=:BASE64:`"),
        },
        "content": { "application/octet-stream": { "schema": {} } },
    })
}

/// Returns the parameters that an object's fields stand for.
fn query_parameters(query: &Schema) -> Vec<Value> {
    let object = query.as_value();
    let required = |field: &str| object["required"].as_array().is_some_and(|all| all.iter().any(|name| name == field));
    let parameter = |(field, schema): (&String, &Value)| {
        let mut schema = schema.clone();
        // A parameter that may be left out is left out; it has no way to be null.
        if let Some(kinds) = schema["type"].as_array().cloned() {
            schema["type"] = kinds.into_iter().find(|kind| kind != "null").unwrap_or_default();
        }
        json!({ "name": field, "in": "query", "required": required(field), "description": schema["description"],
            "schema": schema })
    };
    object.get("properties").and_then(Value::as_object).into_iter().flatten().map(parameter).collect()
}
