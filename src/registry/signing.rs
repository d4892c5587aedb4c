//! Signatures of versions: made when one is registered, asked for whenever one is loaded.
//!
//! What is signed is `manifest.json` byte for byte: it holds the hash of every file, and the lineage. The signature is
//! written before the manifest, so that a version that exists has it.

use std::fs;
use std::path::PathBuf;

use super::{MANIFEST, Manifest, Registry, RegistryError, disk};
use crate::durable::{self, FileError};
use crate::signature::{PublicKey, Signature, SigningKey, Statement};

/// Name of the file in a version's folder.
const SIGNATURE: &str = "manifest.sig";

impl Registry {
    /// Signs a version that is registered already, after its files are found to be what was registered. Whether they are
    /// what they should be is the word of who calls this.
    pub fn sign(&self, version: &str) -> Result<PublicKey, RegistryError> {
        let _lock = self.lock()?;
        let manifest = self.manifest(version)?;
        manifest.check_name(version)?;
        self.check_files(&manifest)?;
        let bytes = self.manifest_bytes(version)?;
        let key = SigningKey::read(&self.settings.signing_key_file)?;
        self.write_checked(version, &key.sign(Statement::Adapter, &bytes)?, &bytes)?;
        Ok(key.public())
    }

    /// Returns by which key a version is signed, where it is; whether that key is trusted is another question.
    pub fn signer(&self, version: &str) -> Result<Option<String>, RegistryError> {
        match durable::read_json::<Signature>(&self.signature_path(version)) {
            Err(error) if error.is_not_found() => Ok(None),
            read => Ok(Some(read?.key)),
        }
    }

    /// Signs the manifest that is about to be written, where there is a key.
    pub(super) fn write_signature(&self, manifest: &Manifest) -> Result<(), RegistryError> {
        if self.settings.signing_key_file.as_os_str().is_empty() {
            return Ok(());
        }
        let bytes = durable::json_bytes(&self.path(&manifest.version).join(MANIFEST), manifest)?;
        let key = SigningKey::read(&self.settings.signing_key_file)?;
        self.write_checked(&manifest.version, &key.sign(Statement::Adapter, &bytes)?, &bytes)
    }

    /// Writes a signature unless it would not count here: a version by a key that is not trusted could never be loaded.
    fn write_checked(&self, version: &str, signature: &Signature, manifest: &[u8]) -> Result<(), RegistryError> {
        let trusted = self.trusted()?;
        if !trusted.is_empty() {
            signature.check(Statement::Adapter, manifest, &trusted, &named(version))?;
        }
        Ok(disk::write_json(&self.signature_path(version), signature)?)
    }

    /// Refuses a version that none of the trusted keys signed, where there are any.
    pub(super) fn check_signature(&self, manifest: &Manifest) -> Result<(), RegistryError> {
        let (trusted, what) = (self.trusted()?, named(&manifest.version));
        if trusted.is_empty() {
            return Ok(());
        }
        let signature = Signature::read(&self.signature_path(&manifest.version), Statement::Adapter, &what)?;
        let bytes = self.manifest_bytes(&manifest.version)?;
        signature.check(Statement::Adapter, &bytes, &trusted, &what)?;
        // What was parsed before is what was signed, also where somebody writes between the two.
        match serde_json::from_slice::<Manifest>(&bytes) {
            Ok(signed) if signed == *manifest => Ok(()),
            _ => Err(RegistryError::Manifest {
                version: manifest.version.clone(),
                why: "it changed while it was read".to_owned(),
            }),
        }
    }

    fn trusted(&self) -> Result<Vec<PublicKey>, RegistryError> {
        Ok(PublicKey::parse_all(&self.settings.trusted_keys)?)
    }

    fn manifest_bytes(&self, version: &str) -> Result<Vec<u8>, RegistryError> {
        let path = self.path(version).join(MANIFEST);
        Ok(fs::read(&path).map_err(|e| FileError::io("cannot read", &path, e))?)
    }

    fn signature_path(&self, version: &str) -> PathBuf {
        self.path(version).join(SIGNATURE)
    }
}

fn named(version: &str) -> String {
    format!("version {version}")
}
