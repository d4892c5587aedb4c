//! Whether an answer is SQL, and whether it runs.
//!
//! Without a schema the answer only has to parse in its dialect (crate `sqlparser`). With one it has to be a query that an
//! SQLite database of that schema, made anew in memory, answers. The query is the work of a model, so it may read and nothing
//! else (SQLite asks about each access before it runs), sees only that database, and is stopped after [`STEPS`] of the
//! virtual machine; its texts and the database itself are bounded.

use rusqlite::Connection;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::limits::Limit;
use sqlparser::dialect::dialect_from_str;
use sqlparser::parser::Parser;

/// What SQLite may execute for one answer, in steps of its virtual machine: about a second.
const STEPS: u32 = 20_000_000;
/// The steps between two looks at the count.
const STEPS_A_LOOK: u32 = 10_000;
/// The longest text or blob that a query may make, in bytes.
const VALUE_BYTES: i32 = 1 << 20;
/// The most memory that the database may hold, in pages of 4 KiB.
const PAGES: u32 = 16_384;
/// How deep a query may nest, for both parsers.
const DEPTH: u16 = 50;

/// A rule ready to check.
#[derive(Debug)]
pub struct Sql {
    dialect: String,
    schema: Option<String>,
}

impl Sql {
    /// Compiles the rule: the dialect is known, and the schema can be set up.
    pub fn compile(dialect: &str, schema: Option<&str>) -> Result<Sql, String> {
        if dialect_from_str(dialect).is_none() {
            return Err(format!(
                "dialect = {dialect:?} is unknown; give one such as \"generic\", \"ansi\", \"sqlite\", \"postgresql\" or \"mysql\""
            ));
        }
        if let Some(schema) = schema {
            if !["generic", "sqlite"].contains(&dialect) {
                return Err(format!(
                    "dialect = {dialect:?} with a schema: queries run on SQLite; leave the dialect or the schema out"
                ));
            }
            database(schema)
                .map_err(|error| format!("schema {schema:?}: {error}; write CREATE TABLE statements of SQLite"))?;
        }
        Ok(Sql { dialect: dialect.to_owned(), schema: schema.map(str::to_owned) })
    }

    /// Returns 1 where the answer parses and, given a schema, runs; 0.5 where it parses only.
    pub fn credit(&self, answer: &str) -> f64 {
        let query = unfenced(answer);
        match &self.schema {
            _ if !self.parses(query) => 0.0,
            Some(schema) if run(schema, query).is_err() => 0.5,
            _ => 1.0,
        }
    }

    fn parses(&self, query: &str) -> bool {
        // A dialect cannot be shared between threads, so it is not kept.
        let Some(dialect) = dialect_from_str(&self.dialect) else { return false };
        let parser = Parser::new(dialect.as_ref()).with_recursion_limit(DEPTH.into()).try_with_sql(query);
        parser.and_then(|mut parser| parser.parse_statements()).is_ok_and(|statements| !statements.is_empty())
    }
}

/// Makes an empty database and sets up the schema.
fn database(schema: &str) -> rusqlite::Result<Connection> {
    let database = Connection::open_in_memory()?;
    database.execute_batch(schema)?;
    Ok(database)
}

/// Runs one query to its last row.
fn run(schema: &str, query: &str) -> rusqlite::Result<()> {
    let mut database = database(schema)?;
    database.pragma_update(None, "max_page_count", PAGES)?;
    database.set_limit(Limit::SQLITE_LIMIT_LENGTH, VALUE_BYTES)?;
    database.set_limit(Limit::SQLITE_LIMIT_EXPR_DEPTH, DEPTH.into())?;
    database.set_limit(Limit::SQLITE_LIMIT_ATTACHED, 0)?;
    database.authorizer(Some(reads_only))?;
    let mut looks = STEPS / STEPS_A_LOOK;
    let over = move || {
        looks = looks.saturating_sub(1);
        looks == 0
    };
    database.progress_handler(STEPS_A_LOOK as i32, Some(over))?;
    // More than one statement is refused here.
    let mut statement = database.prepare(query)?;
    let mut rows = statement.query([])?;
    while rows.next()?.is_some() {}
    Ok(())
}

fn reads_only(access: AuthContext<'_>) -> Authorization {
    match access.action {
        AuthAction::Select | AuthAction::Read { .. } | AuthAction::Recursive => Authorization::Allow,
        AuthAction::Function { function_name } if function_name != "load_extension" => Authorization::Allow,
        _ => Authorization::Deny,
    }
}

/// Takes a single block of code out of its fence.
fn unfenced(answer: &str) -> &str {
    let body = answer.trim();
    let Some(inner) = body.strip_prefix("```").and_then(|rest| rest.strip_suffix("```")) else { return body };
    inner.strip_prefix("sql").unwrap_or(inner).trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOP: &str =
        "CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL); INSERT INTO item VALUES (1, 'tea', 2.5)";

    fn credits(rule: &Sql, cases: &[(&str, f64)]) {
        for (answer, credit) in cases {
            assert_eq!(rule.credit(answer), *credit, "{answer}");
        }
    }

    #[test]
    fn without_a_schema_an_answer_has_to_parse() {
        let cases = [
            ("SELECT a FROM b WHERE c > 1", 1.0),
            ("```sql\nSELECT 1;\n```", 1.0),
            ("SELECT (a FROM b", 0.0),
            ("Here you are: SELECT 1", 0.0),
            ("", 0.0),
            ("-- nothing", 0.0),
        ];
        credits(&Sql::compile("generic", None).unwrap(), &cases);
        let only_postgres = "SELECT DISTINCT ON (a) a FROM b";
        assert_eq!(Sql::compile("postgresql", None).unwrap().credit(only_postgres), 1.0);
    }

    #[test]
    fn with_a_schema_a_query_has_to_run_on_it() {
        let cases = [
            ("SELECT name, price FROM item ORDER BY price", 1.0),
            ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5) SELECT sum(i) FROM n", 1.0),
            ("SELECT colour FROM item", 0.5),
            ("SELECT * FROM customer", 0.5),
            ("SELEC 1", 0.0),
        ];
        credits(&Sql::compile("sqlite", Some(SHOP)).unwrap(), &cases);
    }

    #[test]
    fn a_query_may_read_and_nothing_else_and_not_without_end() {
        let endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n";
        let deep = format!("SELECT {}1{}", "(".repeat(5_000), ")".repeat(5_000));
        let cases = [
            ("DELETE FROM item", 0.5),
            ("DROP TABLE item", 0.5),
            ("CREATE TABLE other (a INT)", 0.5),
            ("SELECT 1; SELECT 2", 0.5),
            ("SELECT length(zeroblob(2000000))", 0.5),
            ("SELECT * FROM pragma_database_list", 0.5),
            (endless, 0.5),
            (deep.as_str(), 0.0),
        ];
        let rule = Sql::compile("sqlite", Some(SHOP)).unwrap();
        credits(&rule, &cases);
        let file = tempfile::tempdir().unwrap();
        let attach = format!("ATTACH '{}' AS x", file.path().join("x").display());
        assert!(rule.credit(&attach) < 1.0 && !file.path().join("x").exists());
        assert_eq!(rule.credit("SELECT name FROM item"), 1.0, "each answer meets the schema as it was written");
    }

    #[test]
    fn a_rule_that_cannot_work_is_refused() {
        let refusal = |dialect: &str, schema| Sql::compile(dialect, schema).unwrap_err();
        assert!(refusal("klingon", None).contains("\"klingon\""));
        assert!(refusal("mysql", Some(SHOP)).contains("SQLite"));
        assert!(refusal("sqlite", Some("CREATE TABL x")).contains("CREATE TABLE statements"));
    }
}
