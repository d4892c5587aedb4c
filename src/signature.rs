//! Signatures over what may be loaded: Ed25519, by keys that OpenSSL makes and checks as well.
//!
//! A hash in the same folder as the file says that nothing was damaged; it does not say who wrote it. Whoever can write
//! where adapters lie (shared storage, a restored backup, the model server's own user) could write the hash, too. A
//! signature needs the key, which lies where only the daemon reads it.
//!
//! What is signed is a statement with the hash of every file, after a line that says what kind of statement it is, so
//! that a signature over one kind is none over another. A private key is a PKCS#8 file in PEM, as `openssl genpkey
//! -algorithm ed25519` writes it; a public key is the base64 of its 32 bytes.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};

use crate::durable::{self, FileError};

/// Name of the file with the signature of a folder of files.
pub const FOLDER_FILE: &str = "taod_signature.json";
/// First and last line of a private key's file.
const PEM: [&str; 2] = ["-----BEGIN PRIVATE KEY-----", "-----END PRIVATE KEY-----"];

/// Why something is not signed, or its signature does not count.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    #[error("the signing key {path} cannot be read: {source}; `taod adapters keygen` makes one")]
    KeyFile { path: String, source: std::io::Error },
    #[error(
        "others than its owner may read or write the signing key {path} (mode {mode:o}): chmod 600 it, and make a new one if somebody did"
    )]
    KeyOpen { path: String, mode: u32 },
    #[error(
        "{path} is no Ed25519 key in PKCS#8 PEM: make one by `taod adapters keygen` or `openssl genpkey -algorithm ed25519`"
    )]
    KeyFormat { path: String },
    #[error("{0} is there already: a key that is overwritten can sign nothing any more")]
    KeyExists(String),
    #[error(
        "{0:?} is no public key: give the base64 of an Ed25519 key's 32 bytes, as `taod adapters keygen` prints it"
    )]
    PublicKey(String),
    #[error(
        "{what} is not signed ({path} is missing): sign it by `taod {command} sign`, where you know that it is yours"
    )]
    Unsigned { what: String, path: String, command: &'static str },
    #[error(
        "{what} is signed by {key}, which is not among the trusted keys: add the key or sign it anew, where you know that it is yours"
    )]
    Untrusted { what: String, key: String },
    #[error(
        "the signature of {what} does not fit what is there: somebody changed it after {key} signed it; restore it"
    )]
    Forged { what: String, key: String },
    #[error("file {file} of {what} {how}: restore what was signed")]
    Changed { what: String, file: String, how: &'static str },
    #[error("nothing could be signed: the cryptographic library failed")]
    Library,
    #[error(transparent)]
    File(#[from] FileError),
}

/// What a signature is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statement {
    /// The bytes of a registered version's `manifest.json`.
    Adapter,
    /// One line `sha256  name` for each file of a reward model's folder, as `sha256sum` prints them, ordered by name.
    RewardModel,
}

impl Statement {
    /// Returns the line that stands before what is signed.
    fn heading(self) -> &'static str {
        match self {
            Statement::Adapter => "taod adapter 1\n",
            Statement::RewardModel => "taod reward model 1\n",
        }
    }

    fn command(self) -> &'static str {
        match self {
            Statement::Adapter => "adapters",
            Statement::RewardModel => "reward",
        }
    }

    fn text(self, body: &[u8]) -> Vec<u8> {
        [self.heading().as_bytes(), body].concat()
    }
}

/// A key by which signatures are checked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// Reads the base64 of a key.
    pub fn parse(text: &str) -> Result<PublicKey, SignatureError> {
        let bytes = BASE64_STANDARD.decode(text).ok().and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
        bytes.map(PublicKey).ok_or_else(|| SignatureError::PublicKey(text.to_owned()))
    }

    /// Reads a list of keys.
    pub fn parse_all(texts: &[String]) -> Result<Vec<PublicKey>, SignatureError> {
        texts.iter().map(|text| PublicKey::parse(text)).collect()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64_STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A key that signs. It is read at the moment of use and never printed.
pub struct SigningKey(Ed25519KeyPair);

impl SigningKey {
    /// Reads the key in `path`, which nobody but its owner may read. What systemd's `LoadCredential` lays out has an access
    /// list, whose mask looks like a right of the group: there only the others count.
    pub fn read(path: &Path) -> Result<SigningKey, SignatureError> {
        let shown = path.display().to_string();
        let fail = |source| SignatureError::KeyFile { path: shown.clone(), source };
        let mode = fs::metadata(path).map_err(fail)?.permissions().mode() & 0o777;
        let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
        let closed = if credentials.is_some_and(|folder| path.starts_with(folder)) { 0o037 } else { 0o077 };
        if mode & closed != 0 {
            return Err(SignatureError::KeyOpen { path: shown, mode });
        }
        SigningKey::from_pem(&fs::read_to_string(path).map_err(fail)?).ok_or(SignatureError::KeyFormat { path: shown })
    }

    fn from_pem(text: &str) -> Option<SigningKey> {
        let body = text.split_once(PEM[0])?.1.split_once(PEM[1])?.0;
        let body: String = body.split_whitespace().collect();
        Ed25519KeyPair::from_pkcs8(&BASE64_STANDARD.decode(body).ok()?).ok().map(SigningKey)
    }

    /// Makes a new key, writes it to `path`, for its owner alone, and returns its public half.
    pub fn generate(path: &Path) -> Result<PublicKey, SignatureError> {
        let pair = Ed25519KeyPair::generate().map_err(|_| SignatureError::Library)?;
        let der = pair.to_pkcs8v1().map_err(|_| SignatureError::Library)?;
        let text = format!("{}\n{}\n{}\n", PEM[0], BASE64_STANDARD.encode(der.as_ref()), PEM[1]);
        let write = || -> std::io::Result<()> {
            use std::io::Write;
            let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(path)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()
        };
        match write() {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(SignatureError::KeyExists(path.display().to_string()));
            }
            written => written.map_err(|e| FileError::io("cannot write", path, e))?,
        }
        durable::sync_folder(path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))?;
        Ok(SigningKey(pair).public())
    }

    /// Returns the key by which what this one signs is checked.
    pub fn public(&self) -> PublicKey {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.0.public_key().as_ref());
        PublicKey(bytes)
    }

    /// Signs a statement.
    pub fn sign(&self, statement: Statement, body: &[u8]) -> Result<Signature, SignatureError> {
        let signature = self.0.try_sign(&statement.text(body)).map_err(|_| SignatureError::Library)?;
        Ok(Signature { key: self.public().to_string(), signature: BASE64_STANDARD.encode(signature.as_ref()) })
    }
}

/// Who signed something, and the signature: a file of its own beside what it is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// The public key, in base64.
    pub key: String,
    /// The signature's 64 bytes, in base64.
    pub signature: String,
}

impl Signature {
    /// Reads the signature of `what` from `path`.
    pub fn read(path: &Path, statement: Statement, what: &str) -> Result<Signature, SignatureError> {
        match durable::read_json(path) {
            Err(error) if error.is_not_found() => Err(SignatureError::Unsigned {
                what: what.to_owned(),
                path: path.display().to_string(),
                command: statement.command(),
            }),
            read => Ok(read?),
        }
    }

    /// Checks that one of `trusted` signed `body`.
    pub fn check(
        &self,
        statement: Statement,
        body: &[u8],
        trusted: &[PublicKey],
        what: &str,
    ) -> Result<(), SignatureError> {
        let (what, key) = (what.to_owned(), self.key.clone());
        let Some(public) = trusted.iter().find(|public| public.to_string() == key) else {
            return Err(SignatureError::Untrusted { what, key });
        };
        let signature = BASE64_STANDARD.decode(&self.signature).unwrap_or_default();
        let checked = UnparsedPublicKey::new(&ED25519, public.0).verify(&statement.text(body), &signature);
        checked.map_err(|_| SignatureError::Forged { what, key })
    }
}

/// The signature of a folder, with the hashes of the files that it is over.
#[derive(Debug, Serialize, Deserialize)]
struct FolderSignature {
    #[serde(flatten)]
    by: Signature,
    /// SHA-256 of each file.
    files: BTreeMap<String, String>,
}

/// Signs all files of a reward model's folder.
pub fn sign_folder(folder: &Path, key: &SigningKey) -> Result<(), SignatureError> {
    let files = hashes(folder)?;
    let by = key.sign(Statement::RewardModel, listing(&files).as_bytes())?;
    Ok(durable::write_json(&folder.join(FOLDER_FILE), &FolderSignature { by, files })?)
}

/// Checks that one of `trusted` signed a reward model's folder, and that its files are those that were signed: none
/// changed, none added, none gone.
pub fn check_folder(folder: &Path, trusted: &[PublicKey]) -> Result<(), SignatureError> {
    let (what, path) = (folder.display().to_string(), folder.join(FOLDER_FILE));
    let signed: FolderSignature = match durable::read_json(&path) {
        Err(error) if error.is_not_found() => {
            let (path, command) = (path.display().to_string(), Statement::RewardModel.command());
            return Err(SignatureError::Unsigned { what, path, command });
        }
        read => read?,
    };
    signed.by.check(Statement::RewardModel, listing(&signed.files).as_bytes(), trusted, &what)?;
    let found = hashes(folder)?;
    let differs =
        |how: &'static str, file: &String| SignatureError::Changed { what: what.clone(), file: file.clone(), how };
    for (file, hash) in &signed.files {
        match found.get(file) {
            None => return Err(differs("is missing", file)),
            Some(now) if now != hash => return Err(differs("was changed after it was signed", file)),
            Some(_) => {}
        }
    }
    match found.keys().find(|file| !signed.files.contains_key(*file)) {
        Some(file) => Err(differs("was added after it was signed", file)),
        None => Ok(()),
    }
}

fn listing(files: &BTreeMap<String, String>) -> String {
    files.iter().map(|(name, hash)| format!("{hash}  {name}\n")).collect()
}

/// Returns the hash of every file of a folder but its signature; what lies in folders below is read by no model.
fn hashes(folder: &Path) -> Result<BTreeMap<String, String>, SignatureError> {
    let list = |e| FileError::io("cannot list", folder, e);
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(list)? {
        let path = entry.map_err(list)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name != FOLDER_FILE && path.is_file() {
            files.insert(name, durable::sha256_file(&path)?);
        }
    }
    Ok(files)
}

#[cfg(test)]
#[path = "signature_tests.rs"]
mod tests;
