//! `taod admin`: who may ask the page.

use anyhow::Context;
use chrono::Utc;
use clap::Subcommand;

use super::lines::Output;
use super::{Exit, Global, Usage};
use crate::admin::token::{Role, Tokens};

/// What is asked about the page's tokens.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a token and print it. It can be seen this once: the file admin.token_file keeps its hash alone.
    Token {
        /// Who will hold it; records of actions name this.
        name: String,
        /// What it allows.
        #[arg(long, value_enum)]
        role: Role,
    },
    /// List who holds a token.
    Tokens {
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Take a token away. It is refused from now on, and browsers that signed in with it are signed out.
    Revoke {
        /// Whose token.
        name: String,
    },
}

pub(super) fn run(global: &Global, command: &Command) -> anyhow::Result<Exit> {
    let file = global.load()?.config.admin.token_file;
    if file.as_os_str().is_empty() {
        let message = "admin.token_file is empty: name the file that shall keep the tokens' hashes, such as \"/var/lib/taod/tokens.json\"";
        return Err(Usage(message.into()).into());
    }
    let tokens = Tokens::at(&file);
    let mut out = Output::stdout();
    match command {
        Command::Token { name, role } => {
            let token = tokens.make(name, *role, Utc::now())?;
            out.text(&format!("{}\n", token.expose()))?;
        }
        Command::Tokens { json: true } => out.line(&tokens.list()?)?,
        Command::Tokens { json: false } => {
            for holder in tokens.list()? {
                out.text(&format!("{}  {}  {}\n", holder.name, holder.role.as_str(), holder.created.format("%F")))?;
            }
        }
        Command::Revoke { name } => {
            tokens.revoke(name)?;
            out.text(&format!("{name} has no token any more\n"))?;
        }
    }
    out.flush().context("cannot print")?;
    Ok(Exit::Done)
}
