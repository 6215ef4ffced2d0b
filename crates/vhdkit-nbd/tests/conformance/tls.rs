//! STARTTLS: what goes before it, what it forgets, who may come.

use vhdkit_nbd::{Export, Options, Tls};
use vhdkit_testkit::nbd::wire::{self, code, command_flag as flag, info, option, reply};
use vhdkit_testkit::nbd::{Fault, Handshake, Mode, Request, Transmission, connect};

use crate::support::tls::{self, TlsStream};
use crate::support::{MIB, NAME, Served, image, pattern};

fn served(tls: Tls) -> Served {
    let export = Export::new(NAME, image(64 * MIB)).unwrap().writable(true);
    Served::new(vec![export], Options { tls: Some(tls), ..Options::default() })
}

fn begin(server: &Served, mode: Mode) -> Transmission<TlsStream> {
    let mut handshake = tls::upgrade(server.handshake(), None).unwrap();
    handshake.agree_on(mode).unwrap();
    if mode != Mode::Simple {
        handshake.set_meta_context(NAME, &connect::CONTEXTS).unwrap();
    }
    handshake.go(NAME, &[]).unwrap()
}

#[test]
fn where_tls_is_required_nothing_goes_before_it() {
    let server = served(tls::server(false));
    let mut handshake = server.handshake();
    let name = wire::info_data(NAME.as_bytes(), &[]);
    for (option, data) in [
        (option::LIST, b"".as_slice()),
        (option::INFO, &name),
        (option::GO, &name),
        (option::STRUCTURED_REPLY, b""),
        (option::EXTENDED_HEADERS, b""),
        (option::LIST_META_CONTEXT, b""),
        (option::SET_META_CONTEXT, b""),
        (option::PEEK_EXPORT, b""),
        (99, b"data"),
    ] {
        let refusal = handshake.option(option, data).unwrap_err().refusal();
        assert_eq!(refusal, Some(reply::ERR_TLS_REQD), "option {option}");
    }
    assert!(server.handshake().export_name(NAME).unwrap_err().is_closed());
    server.handshake().abort().unwrap();
    let mut disk = tls::upgrade(handshake, None).unwrap().go(NAME, &[]).unwrap();
    assert_eq!(disk.read(0, 512).unwrap(), [0; 512]);
}

#[test]
fn starttls_has_no_data_and_comes_once() {
    let server = served(tls::server(false));
    let mut handshake = server.handshake();
    let refused = handshake.option(option::STARTTLS, b"data").unwrap_err();
    assert_eq!(refused.refusal(), Some(reply::ERR_INVALID));
    let mut handshake = tls::upgrade(handshake, None).unwrap();
    assert_eq!(handshake.starttls().unwrap_err().refusal(), Some(reply::ERR_INVALID));
    assert_eq!(handshake.list().unwrap().len(), 1, "the session goes on");
    let export = handshake.info("", &[info::NAME]).unwrap();
    assert_eq!(export.name.as_deref(), Some(NAME));
    handshake.abort().unwrap();
}

#[test]
fn tls_forgets_what_was_agreed_on_before() {
    let server = served(tls::server(false).optional());
    for mode in [Mode::Structured, Mode::Extended] {
        let mut handshake = server.handshake();
        handshake.agree_on(mode).unwrap();
        handshake.set_meta_context(NAME, &connect::CONTEXTS).unwrap();
        let mut handshake = tls::upgrade(handshake, None).unwrap();
        let refused = handshake.set_meta_context(NAME, &connect::CONTEXTS).unwrap_err();
        assert_eq!(refused.refusal(), Some(reply::ERR_INVALID), "structured replies are forgotten");
        let mut disk = handshake.go(NAME, &[]).unwrap();
        assert_eq!(disk.mode(), Mode::Simple);
        assert_eq!(disk.read(0, 512).unwrap(), [0; 512]);
        assert_eq!(disk.code(Request::block_status(0, 512)).unwrap(), code::EINVAL);
    }
}

#[test]
fn where_tls_is_optional_both_are_served() {
    let server = served(tls::server(false).optional());
    let mut plain = server.begin(Mode::Extended);
    plain.write(0, &[7; 512]).unwrap();
    assert_eq!(begin(&server, Mode::Extended).read(0, 512).unwrap(), [7; 512]);
}

#[test]
fn commands_go_over_tls_in_all_modes() {
    let server = served(tls::server(false));
    let bytes = pattern(6, 20 * MIB as usize + 333);
    for mode in Mode::ALL {
        let mut disk = begin(&server, mode);
        disk.write(777, &bytes).unwrap();
        assert!(disk.read(777, bytes.len() as u64).unwrap() == bytes, "{mode:?}");
        let mut cookies = Vec::new();
        for index in 0..200_u64 {
            let request = match index % 4 {
                0 => Request::write(40 * MIB + index * 600, pattern(index, 600)),
                1 => Request::write_zeroes(50 * MIB, 4096).with_flags(flag::FUA),
                2 => Request::flush(),
                _ => Request::read(index * 5000, 5000),
            };
            cookies.push(disk.send(request).unwrap());
        }
        for cookie in cookies {
            disk.receive_of(cookie).unwrap().successful().unwrap();
        }
        for index in (0..200_u64).step_by(4) {
            assert_eq!(disk.read(40 * MIB + index * 600, 600).unwrap(), pattern(index, 600));
        }
        disk.disconnect().unwrap();
    }
}

#[test]
fn the_end_of_a_session_is_an_end_of_tls_too() {
    let server = served(tls::server(false));
    for mode in Mode::ALL {
        let mut disk = begin(&server, mode);
        disk.send_bytes(&Request::disconnect().bytes(mode, 0)).unwrap();
        // Without a farewell this is an error, as it could be an attacker who cuts the connection.
        let end = std::io::Read::read(disk.stream(), &mut [0]);
        assert!(matches!(end, Ok(0)), "{mode:?}: {end:?}");
    }
}

#[test]
fn words_right_behind_the_handshake_of_tls_are_heard() {
    let server = served(tls::server(false));
    let mut handshake = server.handshake();
    handshake.starttls().unwrap();
    let words = [wire::option_bytes(option::LIST, b""), wire::option_bytes(option::STRUCTURED_REPLY, b"")].concat();
    let mut handshake = handshake.upgrade(|stream| tls::wrap_saying(stream, None, &words)).unwrap();
    assert_eq!(handshake.receive_replies(option::LIST).unwrap().len(), 1);
    assert!(handshake.receive_replies(option::STRUCTURED_REPLY).unwrap().is_empty());
}

#[test]
fn only_clients_that_the_authority_signed_are_served_where_that_is_wanted() {
    let server = served(tls::server(true));
    let mut disk = tls::upgrade(server.handshake(), Some("client")).unwrap().go(NAME, &[]).unwrap();
    assert_eq!(disk.read(0, 512).unwrap(), [0; 512]);
    for certificate in [None, Some("other")] {
        // With TLS 1.3 the client may think that all is well until it asks for something.
        let refused = tls::upgrade(server.handshake(), certificate).and_then(|mut handshake| handshake.list());
        assert!(matches!(refused, Err(Fault::Io(_))), "{certificate:?}: {refused:?}");
    }
    server.wait_until_connected(1);
}

#[test]
fn a_client_that_speaks_no_tls_after_starttls_is_cut_off() {
    let server = served(tls::server(false));
    for words in [b"IHAVEOPT\0\0\0\x03\0\0\0\0".as_slice(), &[0; 64], b"GET / HTTP/1.1\r\n\r\n"] {
        let mut handshake: Handshake<_> = server.handshake();
        handshake.starttls().unwrap();
        handshake.send_bytes(words).unwrap();
        // There may be an alert first, which is no answer to an option.
        assert!(handshake.receive_replies(option::LIST).is_err());
        drop(handshake);
    }
    server.wait_until_empty();
}
