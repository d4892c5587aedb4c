//! What docs/security.md claims of the program as a whole.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::harness::{taod, taod_in};

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn what_is_written_is_for_its_owner_alone() {
    let folder = tempfile::tempdir().unwrap();
    taod_in(folder.path(), &["adapters", "list"], &[]).code(0);
    for made in ["var", "var/registry", "var/registry/adapters"] {
        assert_eq!(mode(&folder.path().join(made)) & 0o007, 0, "{made} is open to every user");
    }
    // The group, which the model server's user is in, passes through to the adapters and sees nothing else.
    assert_eq!(mode(&folder.path().join("var/registry")), 0o710);
    assert_eq!(mode(&folder.path().join("var/registry/adapters")), 0o750);
    assert_eq!(mode(&folder.path().join("var/registry/quarantine")), 0o700);
    let file = [("TAOD__ADMIN__TOKEN_FILE", "tokens.json")];
    let token = taod_in(folder.path(), &["admin", "token", "anna", "--role", "operate"], &file).code(0).out;
    assert_eq!(mode(&folder.path().join("tokens.json")), 0o600);
    let kept = std::fs::read_to_string(folder.path().join("tokens.json")).unwrap();
    assert!(token.starts_with("taod_") && !kept.contains(token.trim()), "{kept}");
    assert_eq!(
        taod_in(folder.path(), &["admin", "tokens"], &file).code(0).out.split_whitespace().nth(1),
        Some("operate")
    );
    taod_in(folder.path(), &["admin", "token", "anna", "--role", "read"], &file)
        .refused(&["anna", "has a token already"]);
    taod_in(folder.path(), &["admin", "revoke", "anna"], &file).code(0);
    assert_eq!(taod_in(folder.path(), &["admin", "tokens"], &file).code(0).out, "");
    assert!(taod(&["admin", "tokens"]).code(64).err.contains("admin.token_file is empty"));
}

#[test]
fn an_open_page_is_refused_before_anything_starts() {
    let check = |listen: &str| {
        let variables = [("TAOD__ADMIN__LISTEN", listen)];
        taod_in(tempfile::tempdir().unwrap().path(), &["config", "check"], &variables)
    };
    assert!(check("0.0.0.0:9464").code(64).err.contains("needs TLS"));
    check("127.0.0.1:0").code(0);
}

#[test]
fn a_schema_of_a_rule_fetches_nothing() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "[[workload]]\nname = \"w\"\nmatch = \"name\"\nhouse_rules = \"\"\n\
         rules = [{{ kind = \"json\", schema = '{{ \"$ref\": \"http://{address}/schema.json\" }}' }}]\n"
    );
    std::fs::write(folder.path().join("taod.toml"), config).unwrap();
    std::fs::write(folder.path().join("in.jsonl"), "{\"workload\":\"w\",\"messages\":[],\"response\":\"{}\"}\n")
        .unwrap();
    let outcome = taod_in(folder.path(), &["score", "--config", "taod.toml", "--input", "in.jsonl"], &[]);
    assert_ne!(outcome.code, 0, "{}", outcome.out);
    assert!(outcome.err.contains("schema"), "{}", outcome.err);
    server.set_nonblocking(true).unwrap();
    let asked = server.accept();
    assert!(asked.is_err(), "the schema was fetched: {asked:?}");
}
