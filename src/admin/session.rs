//! Sessions of browsers: a token is shown once at `/login`, and a cookie stands for it until it is taken back or a night
//! has passed. They live in memory alone; a restart asks everybody to log in again.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, header};
use subtle::ConstantTimeEq;

use super::token::{Holder, digest, random};

/// The longest that a session lasts.
const LIFE: Duration = Duration::from_secs(12 * 3600);
/// Sessions at a time; the oldest one makes room.
const MOST: usize = 256;

/// All sessions of the page.
pub(super) struct Sessions {
    /// What the answers to forms are made with; it dies with the process.
    secret: [u8; 32],
    /// Hash of the cookie -> since when, and whose. The cookie itself is not kept.
    open: Mutex<HashMap<[u8; 32], (Instant, Holder)>>,
}

impl Default for Sessions {
    fn default() -> Self {
        Sessions { secret: random(), open: Mutex::default() }
    }
}

impl Sessions {
    /// Begins a session and returns the cookie of it, as a `Set-Cookie` header says it.
    pub(super) fn begin(&self, holder: Holder, tls: bool) -> String {
        let value = hex::encode(random());
        let now = Instant::now();
        let mut open = self.lock();
        open.retain(|_, (since, _)| now.duration_since(*since) < LIFE);
        if open.len() >= MOST
            && let Some(oldest) = open.iter().min_by_key(|(_, (since, _))| *since).map(|(key, _)| *key)
        {
            open.remove(&oldest);
        }
        open.insert(digest(&value), (now, holder));
        let secure = if tls { "; Secure" } else { "" };
        format!("{}={value}; Path=/; HttpOnly; SameSite=Strict; Max-Age={}{secure}", cookie_name(tls), LIFE.as_secs())
    }

    /// Ends the session of a cookie.
    pub(super) fn end(&self, cookie: &str) {
        self.lock().remove(&digest(cookie));
    }

    /// Returns whose session the cookie stands for.
    pub(super) fn holder(&self, cookie: &str) -> Option<Holder> {
        let open = self.lock();
        let (since, holder) = open.get(&digest(cookie))?;
        (since.elapsed() < LIFE).then(|| holder.clone())
    }

    /// Returns the session's cookie of a request.
    pub(super) fn cookie(&self, headers: &HeaderMap, tls: bool) -> Option<String> {
        let name = cookie_name(tls);
        let all = headers.get_all(header::COOKIE).into_iter().filter_map(|value| value.to_str().ok());
        let mut pairs = all.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
        pairs.find(|(key, _)| *key == name).map(|(_, value)| value.to_string())
    }

    /// Returns what a form must carry that this caller sends: only our own pages know it.
    pub(super) fn csrf(&self, caller: &str) -> String {
        hex::encode(digest(&format!("{}/{}", hex::encode(self.secret), hex::encode(digest(caller)))))
    }

    /// No code panics while it holds the map, so a poisoned lock is still whole.
    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 32], (Instant, Holder)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Compares two texts in a time that does not depend on where they differ.
pub(super) fn same(a: &str, b: &str) -> bool {
    a.as_bytes().ct_eq(b.as_bytes()).into()
}

/// Under TLS the browser itself holds the cookie to this host and to TLS.
fn cookie_name(tls: bool) -> &'static str {
    if tls { "__Host-taod" } else { "taod" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::token::Role;

    fn holder(name: &str) -> Holder {
        Holder { name: name.into(), role: Role::Read, sha256: "00".into(), created: chrono::Utc::now() }
    }

    fn value(cookie: &str) -> String {
        cookie.split_once('=').unwrap().1.split(';').next().unwrap().to_string()
    }

    #[test]
    fn a_session_lasts_until_it_is_ended_and_its_cookie_is_for_this_page_alone() {
        let sessions = Sessions::default();
        let cookie = sessions.begin(holder("anna"), true);
        for part in ["__Host-taod=", "; Path=/", "; HttpOnly", "; SameSite=Strict", "; Secure"] {
            assert!(cookie.contains(part), "{cookie}");
        }
        assert!(!sessions.begin(holder("anna"), false).contains("Secure"));
        let value = value(&cookie);
        assert_eq!(sessions.holder(&value).unwrap().name, "anna");
        assert_eq!(sessions.holder("guess"), None);
        sessions.end(&value);
        assert_eq!(sessions.holder(&value), None);
    }

    #[test]
    fn sessions_are_bounded_and_the_oldest_makes_room() {
        let sessions = Sessions::default();
        let first = value(&sessions.begin(holder("first"), false));
        for _ in 0..MOST {
            sessions.begin(holder("other"), false);
        }
        assert_eq!(sessions.lock().len(), MOST);
        assert_eq!(sessions.holder(&first), None);
    }

    #[test]
    fn a_forms_mark_belongs_to_one_caller_of_one_process() {
        let (one, other) = (Sessions::default(), Sessions::default());
        assert!(same(&one.csrf("a"), &one.csrf("a")));
        assert!(!same(&one.csrf("a"), &one.csrf("b")) && !same(&one.csrf("a"), &other.csrf("a")));
        assert!(!same("", &one.csrf("a")));
    }
}
