use super::*;

/// The seed of RFC 8032's first test, as `openssl genpkey` would write it.
const PRIVATE: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g\n-----END PRIVATE KEY-----\n";
/// Its public key, as the RFC gives it (d75a9801...).
const PUBLIC: &str = "11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=";
/// OpenSSL 3.0.19: `printf 'taod adapter 1\n{"version":"taod-000000000000"}\n' > m; openssl pkeyutl -sign -inkey k.pem -rawin -in m`.
const BODY: &str = "{\"version\":\"taod-000000000000\"}\n";
const BY_OPENSSL: &str = "6puXCVMDvqu6ycGWBgOFcXCoGKwGMfgawyXn91szx86exUuN6/DXVrOAiZV+0zwtAUoJCTlSk0X8+KzPe1SlBA==";

/// A folder with a key of its own.
struct Desk(tempfile::TempDir);

impl Desk {
    fn new() -> Desk {
        Desk(tempfile::tempdir().unwrap())
    }

    fn key(&self, text: &str, mode: u32) -> Result<SigningKey, SignatureError> {
        let path = self.0.path().join("key.pem");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        SigningKey::read(&path)
    }

    /// A folder as of a reward model.
    fn model(&self) -> PathBuf {
        let folder = self.0.path().join("model");
        fs::create_dir(&folder).unwrap();
        for (name, text) in [("config.json", "{}"), ("model.safetensors", "weights")] {
            fs::write(folder.join(name), text).unwrap();
        }
        folder
    }
}

#[test]
fn a_signature_is_what_openssl_makes_of_the_same_key_and_text() {
    let key = Desk::new().key(PRIVATE, 0o600).unwrap();
    assert_eq!(key.public().to_string(), PUBLIC);
    let signed = key.sign(Statement::Adapter, BODY.as_bytes()).unwrap();
    assert_eq!(signed, Signature { key: PUBLIC.into(), signature: BY_OPENSSL.into() });
}

#[test]
fn a_signature_counts_for_its_text_its_kind_and_its_key_alone() {
    let desk = Desk::new();
    let key = desk.key(PRIVATE, 0o600).unwrap();
    let other = SigningKey::generate(&desk.0.path().join("other.pem")).unwrap();
    let signed = key.sign(Statement::Adapter, BODY.as_bytes()).unwrap();
    let check = |signed: &Signature, statement, body: &str, trusted: &[PublicKey]| {
        signed.check(statement, body.as_bytes(), trusted, "it")
    };
    let trusted = [other, key.public()];
    check(&signed, Statement::Adapter, BODY, &trusted).unwrap();
    let forged = [
        check(&signed, Statement::Adapter, &BODY.replace('0', "1"), &trusted),
        check(&signed, Statement::RewardModel, BODY, &trusted),
        check(&Signature { signature: String::new(), ..signed.clone() }, Statement::Adapter, BODY, &trusted),
        // Another trusted key's name under this signature.
        check(&Signature { key: other.to_string(), ..signed.clone() }, Statement::Adapter, BODY, &trusted),
    ];
    assert!(forged.iter().all(|checked| matches!(checked, Err(SignatureError::Forged { .. }))), "{forged:?}");
    let untrusted = check(&signed, Statement::Adapter, BODY, &[other]);
    assert!(matches!(untrusted, Err(SignatureError::Untrusted { .. })));
}

#[test]
fn a_key_is_made_once_for_its_owner_alone_and_read_by_openssls_format() {
    let desk = Desk::new();
    let path = desk.0.path().join("new.pem");
    let public = SigningKey::generate(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(SigningKey::read(&path).unwrap().public(), public);
    assert_eq!(PublicKey::parse(&public.to_string()).unwrap(), public);
    assert!(matches!(SigningKey::generate(&path), Err(SignatureError::KeyExists(_))));
}

#[test]
fn a_key_that_others_could_read_signs_nothing() {
    let desk = Desk::new();
    for mode in [0o640, 0o604, 0o644, 0o620] {
        let refused = desk.key(PRIVATE, mode).map(|_| ()).unwrap_err();
        assert!(matches!(refused, SignatureError::KeyOpen { mode: told, .. } if told == mode), "{refused}");
        assert!(!refused.to_string().contains("MC4CAQ"), "a key is never printed");
    }
    desk.key(PRIVATE, 0o400).unwrap();
    let broken = desk.key(&PRIVATE.replace("MC4CAQ", "MC4CAA"), 0o600).map(|_| ());
    assert!(matches!(broken, Err(SignatureError::KeyFormat { .. })));
    let missing = SigningKey::read(&desk.0.path().join("none")).map(|_| ()).unwrap_err();
    assert!(missing.to_string().contains("keygen"), "{missing}");
}

#[test]
fn a_folder_is_what_was_signed_or_refused_by_the_file_that_is_not() {
    let desk = Desk::new();
    let (folder, key) = (desk.model(), desk.key(PRIVATE, 0o600).unwrap());
    let check = || check_folder(&folder, &[key.public()]);
    assert!(matches!(check(), Err(SignatureError::Unsigned { .. })));
    sign_folder(&folder, &key).unwrap();
    check().unwrap();
    let change = |name: &str, text: Option<&str>| {
        let path = folder.join(name);
        let before = fs::read(&path).ok();
        match text {
            Some(text) => fs::write(&path, text).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let refused = check().unwrap_err().to_string();
        match before {
            Some(before) => fs::write(&path, before).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        check().unwrap();
        refused
    };
    for (name, text, how) in [
        ("model.safetensors", Some("other weights"), "file model.safetensors of"),
        ("config.json", None, "is missing"),
        ("chat_template.jinja", Some("{{ 1 }}"), "was added after it was signed"),
    ] {
        let refused = change(name, text);
        assert!(refused.contains(how), "{refused}");
    }
    // Hashes that fit the changed files, under the old signature.
    let listed = fs::read_to_string(folder.join(FOLDER_FILE)).unwrap();
    let (old, new) = ("weights", "other weights");
    let hash = |text: &str| {
        fs::write(desk.0.path().join("t"), text).unwrap();
        durable::sha256_file(&desk.0.path().join("t")).unwrap()
    };
    fs::write(folder.join("model.safetensors"), new).unwrap();
    fs::write(folder.join(FOLDER_FILE), listed.replace(&hash(old), &hash(new))).unwrap();
    assert!(matches!(check(), Err(SignatureError::Forged { .. })));
}
