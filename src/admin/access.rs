//! Who asks, by which name, and what that allows: the one gate before every route.
//!
//! | route's need | on loopback, by a loopback name | else |
//! |---|---|---|
//! | [`Need::Nothing`] | anyone | anyone |
//! | [`Need::Figures`] | anyone on this machine | role `read` |
//! | [`Need::Prompts`] | role `read` | role `read` |
//! | [`Need::Operate`] | role `operate` | role `operate` |
//!
//! A request must name this host (`Host`), and where a browser tells the page it comes from (`Origin`), that page must be
//! ours. So a web page that points its own name at 127.0.0.1 gets nothing, and no other page can act in a user's name.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Redirect, Response};

use super::connection::Peer;
use super::session::Sessions;
use super::settings::{Settings, given};
use super::token::{Role, Tokens};

/// What a route asks of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Nothing: health, the way in, style.
    Nothing,
    /// To see figures, hashes and times.
    Figures,
    /// To see the text of prompts and answers.
    Prompts,
    /// To change something.
    Operate,
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Caller {
    /// The token's holder, or the client certificate; empty for somebody on this machine.
    pub(super) name: String,
    /// What the caller may do; nothing but the figures where it is missing.
    pub(super) role: Option<Role>,
    pub(super) proof: Proof,
}

/// How the caller is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Proof {
    /// Not at all.
    None,
    /// By a token in the request itself, which no foreign page can add.
    Token,
    /// By a certificate or a cookie, which a browser adds by itself, so that a form must carry `csrf` as well.
    Ambient { csrf: String },
}

/// What decides about a request.
pub(super) struct Doors {
    names: Vec<String>,
    loopback: bool,
    pub(super) tls: bool,
    client_role: Role,
    tokens: Option<Tokens>,
    pub(super) sessions: Sessions,
}

/// Headers by which a proxy tells that it asks for somebody else.
const FORWARDED: [&str; 3] = ["forwarded", "x-forwarded-for", "x-real-ip"];

impl Doors {
    /// Returns the doors of a page that listens at `address`.
    pub(super) fn new(settings: &Settings, address: SocketAddr) -> Self {
        let loopback = address.ip().is_loopback();
        let mut names: Vec<String> = settings.hosts.iter().map(|name| name.to_ascii_lowercase()).collect();
        if !loopback && !address.ip().is_unspecified() {
            names.push(address.ip().to_string());
        }
        Doors {
            names,
            loopback,
            tls: settings.has_tls(),
            client_role: settings.client_role,
            tokens: given(&settings.token_file).map(Tokens::at),
            sessions: Sessions::default(),
        }
    }

    /// Returns true where tokens can be shown at all.
    pub(super) fn takes_tokens(&self) -> bool {
        self.tokens.is_some()
    }

    /// Returns who holds a token.
    pub(super) fn holder(&self, token: &str) -> Option<super::token::Holder> {
        self.tokens.as_ref()?.holder(token).unwrap_or_else(|error| {
            tracing::error!(%error, "the page's tokens cannot be read, so nobody is let in by one");
            None
        })
    }

    /// Returns the host that a request names, where it is one of ours.
    fn host<'a>(&self, request: &'a Request) -> Option<&'a str> {
        let mut hosts = request.headers().get_all(header::HOST).iter();
        let (host, None) = (hosts.next()?.to_str().ok()?, hosts.next()) else { return None };
        if request.uri().authority().is_some_and(|authority| authority.as_str() != host) {
            return None;
        }
        let name = name_of(host)?;
        (self.loopback && is_loopback(name) || self.names.contains(&name.to_ascii_lowercase())).then_some(host)
    }

    /// Returns true where the request comes from this machine and says so.
    fn is_local(&self, host: &str, headers: &HeaderMap) -> bool {
        self.loopback
            && name_of(host).is_some_and(is_loopback)
            && FORWARDED.iter().all(|name| !headers.contains_key(*name))
    }

    fn caller(&self, headers: &HeaderMap, peer: &Peer) -> Caller {
        if let Some(holder) = bearer(headers).and_then(|token| self.holder(token)) {
            return Caller { name: holder.name, role: Some(holder.role), proof: Proof::Token };
        }
        if let Some(caller) = self.in_session(headers) {
            return caller;
        }
        match &peer.certificate {
            Some(hash) => {
                let csrf = self.sessions.csrf(hash);
                let name = format!("certificate {}", &hash[..hash.len().min(16)]);
                Caller { name, role: Some(self.client_role), proof: Proof::Ambient { csrf } }
            }
            None => Caller { name: String::new(), role: None, proof: Proof::None },
        }
    }

    /// Returns whose session the cookie is, where the token that opened it still holds.
    fn in_session(&self, headers: &HeaderMap) -> Option<Caller> {
        let cookie = self.sessions.cookie(headers, self.tls)?;
        let opened_by = self.sessions.holder(&cookie)?;
        let now = self.tokens.as_ref()?.list().ok()?;
        let holder = now.into_iter().find(|holder| *holder == opened_by)?;
        let proof = Proof::Ambient { csrf: self.sessions.csrf(&cookie) };
        Some(Caller { name: holder.name, role: Some(holder.role), proof })
    }
}

impl Caller {
    /// Returns true where the caller has `role` or one that includes it.
    pub(super) fn may(&self, role: Role) -> bool {
        self.role.is_some_and(|own| own >= role)
    }

    /// Returns what a form of this caller must carry; nothing where the request proves by itself who sent it.
    pub(super) fn csrf(&self) -> Option<&str> {
        match &self.proof {
            Proof::Ambient { csrf } => Some(csrf),
            Proof::None | Proof::Token => None,
        }
    }
}

/// Lets a request in that names this host and comes from no foreign page, finds out who asks, and adds to each answer
/// what browsers should know. The outermost layer.
pub(super) async fn enter(State(doors): State<Arc<Doors>>, mut request: Request, next: Next) -> Response {
    let mut response = match admit(&doors, &mut request) {
        Ok(()) => next.run(request).await,
        Err(refusal) => *refusal,
    };
    harden(&doors, response.headers_mut());
    response
}

fn admit(doors: &Doors, request: &mut Request) -> Result<(), Box<Response>> {
    let refuse = |message: &str| Box::new((StatusCode::FORBIDDEN, format!("{message}\n")).into_response());
    let Some(host) = doors.host(request).map(str::to_owned) else {
        return Err(refuse("the request names another host; add that name to admin.hosts if it is this one's"));
    };
    if is_foreign(request, &host) {
        return Err(refuse("the request comes from another site's page"));
    }
    let peer = request.extensions().get::<Peer>().cloned().unwrap_or_default();
    let caller = doors.caller(request.headers(), &peer);
    let local = doors.is_local(&host, request.headers());
    request.extensions_mut().insert(Local(local));
    request.extensions_mut().insert(caller);
    Ok(())
}

/// Whether the request comes from this machine itself.
#[derive(Debug, Clone, Copy)]
struct Local(bool);

/// Returns true where a browser says that a page of another origin sent the request.
fn is_foreign(request: &Request, host: &str) -> bool {
    let own = |origin: &str| origin.split_once("://").is_some_and(|(_, authority)| authority == host);
    let headers = request.headers();
    let mut origins = headers.get_all(header::ORIGIN).iter();
    if origins.any(|origin| !origin.to_str().is_ok_and(own)) {
        return true;
    }
    let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD);
    changes && site.is_some_and(|site| !matches!(site, b"same-origin" | b"none"))
}

/// Checks that the caller has what a route needs. Every route has one of these.
pub(super) async fn check(State(need): State<Need>, request: Request, next: Next) -> Response {
    let caller = request.extensions().get::<Caller>();
    let may = |role| caller.is_some_and(|caller| caller.may(role));
    let local = request.extensions().get::<Local>().is_some_and(|local| local.0);
    let allowed = match need {
        Need::Nothing => true,
        Need::Figures => local || may(Role::Read),
        Need::Prompts => may(Role::Read),
        Need::Operate => may(Role::Operate),
    };
    if allowed {
        return next.run(request).await;
    }
    refuse(need, caller.is_some_and(|caller| caller.role.is_some()), &request)
}

fn refuse(need: Need, known: bool, request: &Request) -> Response {
    let role = if need == Need::Operate { Role::Operate } else { Role::Read }.as_str();
    let path = request.uri().path();
    let accepts = request.headers().get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    if !known && *request.method() == Method::GET && accepts.contains("text/html") {
        return Redirect::to(&format!("/login?to={}", super::page::encode(path))).into_response();
    }
    let status = if known { StatusCode::FORBIDDEN } else { StatusCode::UNAUTHORIZED };
    let message = format!("this needs a token with the role {role}; make one with `taod admin token`");
    let body = axum::Json(serde_json::json!({ "error": message }));
    match known {
        true => (status, body).into_response(),
        false => (status, [(header::WWW_AUTHENTICATE, "Bearer realm=\"taod\"")], body).into_response(),
    }
}

/// The caller of a request, for handlers.
pub(super) type Who = Extension<Caller>;

/// Adds what keeps a browser from doing more with an answer than the page means.
fn harden(doors: &Doors, headers: &mut HeaderMap) {
    const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; \
                          form-action 'self'; base-uri 'none'; frame-ancestors 'none'";
    let fixed = [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "same-origin"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    for (name, value) in fixed {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    if doors.tls {
        headers.insert(header::STRICT_TRANSPORT_SECURITY, HeaderValue::from_static("max-age=31536000"));
    }
}

/// Returns the token of an `Authorization: Bearer` header.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Returns the name in a `Host` header, without its port.
fn name_of(host: &str) -> Option<&str> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => host.split_at(host.find(':').unwrap_or(host.len())),
    };
    let fits = port.is_empty() || port.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok());
    (fits && !name.is_empty()).then_some(name)
}

fn is_loopback(name: &str) -> bool {
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
#[path = "access_tests.rs"]
mod tests;
