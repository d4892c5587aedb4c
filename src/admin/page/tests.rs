//! The page as a browser gets it: every page renders, texts stay covered, forms are ours, and nothing in it is alive that came
//! from elsewhere.

use std::sync::Arc;

use crate::admin::actions::{Action, Actions};
use crate::admin::settings::Settings;
use crate::admin::tests::{ask, on_loopback, state, with_page};
use crate::admin::token::{Role, Tokens};

const PAGES: &[&str] = &[
    "/",
    "/live/now",
    "/rounds",
    "/trials",
    "/adapters",
    "/prompts",
    "/decisions",
    "/dead-letters",
    "/config",
    "/login",
];

#[test]
fn every_page_of_a_new_daemon_renders_and_has_nothing_inline() {
    with_page(&on_loopback(), &state().1, async |address| {
        for path in PAGES {
            let page = ask(address, &format!("GET {path}"), &[("Accept", "text/html")], "").await;
            assert_eq!(
                (page.status, page.header("content-type")),
                (200, Some("text/html; charset=utf-8")),
                "{path}: {}",
                page.body
            );
            for inline in ["<style", " style=", "onclick", "javascript:", "https://", "http://"] {
                assert!(!page.body.contains(inline), "{path} has {inline}");
            }
            assert_eq!(
                page.body.matches("<script").count(),
                page.body.matches("<script src=\"/static/live.js\" defer>").count()
            );
        }
        for path in ["/rounds/round-1", "/trials/x", "/adapters/x"] {
            assert_eq!(ask(address, &format!("GET {path}"), &[], "").await.status, 404, "{path}");
        }
        let prompt = ask(address, "GET /prompts/abc?round=round-00001", &[("Accept", "text/html")], "").await;
        assert_eq!((prompt.status, prompt.header("location")), (303, Some("/login?to=%2fprompts%2fabc")));
    });
}

#[test]
fn what_others_wrote_is_shown_and_not_run() {
    let (folder, mut state) = state();
    let (actions, _todo) = Actions::new(folder.path());
    actions.ask(Action::Run, "<b>anna</b>", "<script>alert(1)</script>\" onload=\"x").unwrap();
    state.actions = Arc::new(actions);
    state.facts.health.not_ready("broker", "<img src=x onerror=alert(1)>");
    with_page(&on_loopback(), &state, async |address| {
        let page = ask(address, "GET /", &[], "").await.body;
        assert!(page.contains("&lt;script&gt;alert(1)&lt;&#x2f;script&gt;"), "{page}");
        assert!(page.contains("&lt;img src=x onerror=alert(1)&gt;") && page.contains("&lt;b&gt;anna"));
        assert!(!page.contains("<script>alert") && !page.contains("<img") && !page.contains("\" onload=\""));
    });
}

#[test]
fn a_form_acts_only_with_its_mark_its_reason_and_its_approval() {
    let (folder, mut state) = state();
    let settings = Settings { token_file: folder.path().join("tokens.json"), ..on_loopback() };
    let tokens = Tokens::at(&settings.token_file);
    let make = |name: &str, role| tokens.make(name, role, chrono::Utc::now()).unwrap();
    let (ruth, olga) = (make("ruth", Role::Read), make("olga", Role::Operate));
    let (actions, mut todo) = Actions::new(folder.path());
    state.actions = Arc::new(actions);
    let form = ("Content-Type", "application/x-www-form-urlencoded");
    with_page(&settings, &state, async |address| {
        let sign_in = async |token: &str| {
            let answer = ask(address, "POST /login", &[form], &format!("token={token}")).await;
            answer.header("set-cookie").unwrap().split(';').next().unwrap().to_string()
        };
        let cookie = sign_in(olga.expose()).await;
        let page = ask(address, "GET /", &[("Cookie", &cookie)], "").await.body;
        assert!(page.contains("action=\"/actions/freeze\"") && !page.contains("action=\"/actions/thaw\""), "{page}");
        let csrf = page.split("name=\"csrf\" value=\"").nth(1).unwrap().split('"').next().unwrap().to_string();
        let act = async |cookie: &str, what: &str, body: &str| {
            ask(address, &format!("POST /actions/{what}"), &[form, ("Cookie", cookie)], body).await.status
        };
        assert_eq!(act(&cookie, "freeze", "reason=x").await, 403, "without the mark");
        assert_eq!(act(&cookie, "freeze", &format!("csrf={}&reason=x", "0".repeat(64))).await, 403);
        assert_eq!(act(&cookie, "freeze", &format!("csrf={csrf}&reason=")).await, 422);
        assert_eq!(act(&cookie, "nonsense", &format!("csrf={csrf}&reason=x")).await, 404);
        assert_eq!(act(&cookie, "promote", &format!("csrf={csrf}&reason=x&version=taod-1&approve=taod-2")).await, 422);
        let reader = sign_in(ruth.expose()).await;
        let seen = ask(address, "GET /", &[("Cookie", &reader)], "").await.body;
        assert!(seen.contains("ruth") && !seen.contains("action=\"/actions/"), "a reader sees forms");
        assert_eq!(act(&reader, "freeze", &format!("csrf={csrf}&reason=x")).await, 403);
        assert_eq!(act(&cookie, "freeze", &format!("csrf={csrf}&reason=the+holidays")).await, 303);
    });
    let record = todo.try_recv().unwrap();
    assert_eq!((record.action, record.by.as_str(), record.reason.as_str()), (Action::Freeze, "olga", "the holidays"));
    assert!(todo.try_recv().is_err());
}
