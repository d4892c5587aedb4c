use axum::body::Body;
use axum::http::Request;

use super::*;

fn doors(listen: &str, hosts: &[&str]) -> Doors {
    let hosts = hosts.iter().map(|host| host.to_string()).collect();
    Doors::new(&Settings { hosts, ..Settings::default() }, listen.parse().unwrap())
}

fn request(headers: &[(&str, &str)]) -> axum::extract::Request {
    let mut request = Request::builder().uri("/");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Body::empty()).unwrap()
}

fn host(doors: &Doors, headers: &[(&str, &str)]) -> bool {
    doors.host(&request(headers)).is_some()
}

#[test]
fn a_request_must_name_this_host_once() {
    let local = doors("127.0.0.1:9464", &["taod.example.com"]);
    for right in
        ["127.0.0.1", "127.0.0.1:9464", "localhost:1", "LOCALHOST", "[::1]:80", "[::1]", "Taod.Example.com:443"]
    {
        assert!(host(&local, &[("host", right)]), "{right}");
    }
    let wrong = [
        "evil.example",
        "127.0.0.1.evil.example:80",
        "localhost.evil",
        "",
        "[::1",
        "localhost:99999",
        "localhost:",
        "10.0.0.5",
        "a@localhost",
    ];
    for wrong in wrong {
        assert!(!host(&local, &[("host", wrong)]), "{wrong:?}");
    }
    assert!(!host(&local, &[]), "no Host at all");
    assert!(!host(&local, &[("host", "localhost"), ("host", "evil.example")]), "two hosts");
    let absolute =
        Request::builder().uri("http://evil.example/").header("host", "localhost").body(Body::empty()).unwrap();
    assert!(local.host(&absolute).is_none(), "the target names another host than the header");
}

#[test]
fn off_loopback_only_the_address_and_the_listed_names_count() {
    let open = doors("10.0.0.5:9464", &["taod.example.com"]);
    assert!(host(&open, &[("host", "10.0.0.5:9464")]) && host(&open, &[("host", "taod.example.com")]));
    assert!(!host(&open, &[("host", "localhost")]), "a name that leads to the asker's own machine");
    assert!(!host(&doors("0.0.0.0:9464", &[]), &[("host", "0.0.0.0:9464")]));
}

#[test]
fn a_page_of_another_origin_is_turned_away() {
    let foreign = |method: &str, headers: &[(&str, &str)]| {
        let mut request = request(headers);
        *request.method_mut() = method.parse().unwrap();
        is_foreign(&request, "localhost:9464")
    };
    assert!(!foreign("GET", &[]) && !foreign("POST", &[("origin", "http://localhost:9464")]));
    for origin in [
        "https://evil.example",
        "null",
        "http://localhost:9465",
        "http://localhost:9464.evil.example",
        "localhost:9464",
    ] {
        assert!(foreign("GET", &[("origin", origin)]), "{origin}");
    }
    assert!(
        foreign("POST", &[("sec-fetch-site", "cross-site")]) && foreign("POST", &[("sec-fetch-site", "same-site")])
    );
    assert!(!foreign("GET", &[("sec-fetch-site", "cross-site")]), "a link from elsewhere may lead here");
}

#[test]
fn who_comes_through_a_proxy_is_not_of_this_machine() {
    let local = doors("127.0.0.1:9464", &["taod.example.com"]);
    let is_local = |host: &str, headers: &[(&str, &str)]| local.is_local(host, request(headers).headers());
    assert!(is_local("localhost:9464", &[]));
    assert!(!is_local("taod.example.com", &[]));
    assert!(!is_local("localhost:9464", &[("x-forwarded-for", "10.1.2.3")]));
    assert!(!doors("10.0.0.5:9464", &[]).is_local("10.0.0.5", request(&[]).headers()));
}

#[test]
fn a_certificate_gives_its_role_and_asks_forms_for_a_mark() {
    let doors = doors("10.0.0.5:9464", &[]);
    let peer = Peer { certificate: Some("0123456789abcdef0123".into()) };
    let caller = doors.caller(request(&[]).headers(), &peer);
    assert_eq!((caller.name.as_str(), caller.role), ("certificate 0123456789abcdef", Some(Role::Read)));
    assert!(caller.csrf().is_some() && caller.may(Role::Read) && !caller.may(Role::Operate));
    let nobody = doors.caller(request(&[("authorization", "Bearer taod_x")]).headers(), &Peer::default());
    assert_eq!((nobody.role, nobody.proof), (None, Proof::None));
}
