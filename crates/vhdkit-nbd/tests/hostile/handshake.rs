//! Malformed handshakes.

use std::net::Shutdown;

use vhdkit_nbd::{Export, Options};
use vhdkit_testkit::Rng;
use vhdkit_testkit::nbd::wire::{self, option, reply};
use vhdkit_testkit::nbd::{Fault, Handshake, expect_closed};

use crate::siege::{LITTLE, Siege, assert_cut_off, fault_of};
use crate::support::{MIB, NAME, image, tls};

#[test]
fn clients_with_flags_that_were_not_offered_are_dropped() {
    let siege = Siege::new();
    for flags in (2..32).map(|bit| 1_u32 << bit).chain([u32::MAX, 0x8000_0003]) {
        for flags in [flags, flags | 3] {
            let mut handshake = Handshake::greeted(siege.server.stream()).unwrap();
            handshake.send_client_flags(flags).unwrap();
            expect_closed(handshake.stream()).unwrap_or_else(|fault| panic!("flags {flags:#x}: {fault}"));
        }
    }
    siege.end(LITTLE);
}

#[test]
fn options_with_wrong_magics_end_the_connection() {
    let siege = Siege::new();
    let good = wire::option_bytes(option::LIST, b"");
    for byte in 0..8 {
        for bit in [1, 0x80] {
            let mut wrong = good.clone();
            wrong[byte] ^= bit;
            let mut handshake = siege.handshake();
            handshake.send_bytes(&wrong).unwrap();
            assert_cut_off(&mut handshake);
        }
    }
    // Requests, old handshakes and other protocols instead of options.
    for words in
        [b"NBDMAGIC\0\0\0\x03\0\0\0\0".as_slice(), b"\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\0", &[0; 16], &[0xFF; 16]]
    {
        let mut handshake = siege.handshake();
        handshake.send_bytes(words).unwrap();
        assert_cut_off(&mut handshake);
    }
    siege.end(LITTLE);
}

#[test]
fn options_that_are_announced_and_never_come_cost_nothing() {
    let siege = Siege::new();
    let mut held = Vec::new();
    for kind in (0..14).chain([u32::MAX]) {
        for length in [1, 17, 4097, 16 << 10, (16 << 10) + 1, 1 << 20, (1 << 20) + 1, 32 << 20, 1 << 31, u32::MAX] {
            let mut handshake = siege.handshake();
            let bytes = wire::option_bytes_saying(kind, length, b"x");
            handshake.send_bytes(&bytes[..bytes.len() - usize::from(length == 1)]).unwrap();
            // Some stay, which must not matter, and others say that nothing more will come.
            if held.len() < 40 {
                held.push(handshake);
            } else {
                handshake.stream().shutdown(Shutdown::Write).unwrap();
                assert_cut_off(&mut handshake);
            }
        }
    }
    siege.good_client();
    siege.assert_bounded(LITTLE);
    drop(held);
    siege.end(LITTLE);
}

#[test]
fn long_options_are_refused_or_cut_off_and_never_taken() {
    let siege = Siege::new();
    for kind in [option::LIST, option::INFO, option::GO, option::SET_META_CONTEXT, option::STARTTLS, 99] {
        for length in [20_000, 300_000, 3 << 20, 40 << 20] {
            let mut handshake = siege.handshake();
            let data = vec![0; length];
            // The server may have closed before everything was sent.
            let sent = handshake.send_option(kind, &data);
            match handshake.receive_replies(kind) {
                Err(fault) if fault.refusal().is_some() => {
                    sent.unwrap();
                    handshake.info(NAME, &[]).unwrap_or_else(|fault| panic!("{kind}, {length}: {fault}"));
                }
                other => assert!(fault_of(other).is_closed(), "{kind}, {length}"),
            }
        }
    }
    // The client has all of it in memory, too.
    siege.end(LITTLE + 40 * MIB);
}

#[test]
fn long_names_name_nothing() {
    let siege = Siege::new();
    for length in [4097, 16_300, 65_536, 1 << 20] {
        let name = "n".repeat(length);
        assert!(fault_of(siege.handshake().export_name(&name)).is_closed(), "{length}");
        for kind in [option::INFO, option::GO, option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
            let mut handshake = siege.handshake();
            handshake.structured_reply().unwrap();
            let data = match kind {
                option::INFO | option::GO => wire::info_data(name.as_bytes(), &[]),
                _ => wire::meta_context_data(name.as_bytes(), &[]),
            };
            let fault = fault_of(handshake.option(kind, &data));
            assert!(fault.is_closed() || fault.refusal().is_some(), "{kind}, {length}: {fault}");
            if fault.refusal().is_some() {
                handshake.info(NAME, &[]).unwrap();
            }
        }
    }
    siege.end(LITTLE);
}

#[test]
fn names_that_are_not_text_name_nothing() {
    let siege = Siege::new();
    let mut rng = Rng::new(7);
    let fixed = [b"\xff".to_vec(), b"disk\xc3".to_vec(), b"\xed\xa0\x80".to_vec(), b"disk\0".to_vec(), vec![0; 4096]];
    for name in fixed.into_iter().chain((1..40).map(|length| rng.bytes(length * 7))) {
        let mut handshake = siege.handshake();
        handshake.structured_reply().unwrap();
        for (kind, data) in [
            (option::INFO, wire::info_data(&name, &[])),
            (option::GO, wire::info_data(&name, &[])),
            (option::SET_META_CONTEXT, wire::meta_context_data(&name, &[b"base:allocation"])),
        ] {
            let refusal = fault_of(handshake.option(kind, &data)).refusal();
            let refused = refusal.is_some_and(|kind| [reply::ERR_UNKNOWN, reply::ERR_INVALID].contains(&kind));
            assert!(refused, "{kind}: {name:?}: {refusal:x?}");
        }
        // Queries that are not text are of no namespace that there is.
        let chosen = handshake.option(option::SET_META_CONTEXT, &wire::meta_context_data(NAME.as_bytes(), &[&name]));
        assert!(chosen.is_ok_and(|contexts| contexts.is_empty()));
        handshake.send_option(option::EXPORT_NAME, &name).unwrap();
        assert_cut_off(&mut handshake);
    }
    siege.end(LITTLE);
}

#[test]
fn counts_of_queries_are_not_believed() {
    let siege = Siege::new();
    let mut handshake = siege.handshake();
    handshake.extended_headers().unwrap();
    for count in [2, 1000, 1 << 16, 1 << 30, u32::MAX] {
        for queries in [0, 1, 4000] {
            let mut data = wire::string_bytes(NAME.as_bytes());
            data.extend(count.to_be_bytes());
            // Empty queries are the shortest there are.
            data.extend(vec![0; 4 * queries.min(count as usize - 1)]);
            for kind in [option::SET_META_CONTEXT, option::LIST_META_CONTEXT] {
                assert_eq!(fault_of(handshake.option(kind, &data)).refusal(), Some(reply::ERR_INVALID));
            }
        }
    }
    let many = vec![b"base:allocation".as_slice(); 800];
    let data = wire::meta_context_data(NAME.as_bytes(), &many);
    let chosen = handshake.option(option::SET_META_CONTEXT, &data).unwrap();
    assert_eq!(chosen.len(), 1, "asked for often, chosen once");
    siege.end(LITTLE);
}

#[test]
fn thousands_of_options_are_answered_or_end_the_connection() {
    let siege = Siege::new();
    for (kind, data) in [
        (option::LIST, vec![]),
        (option::STRUCTURED_REPLY, vec![]),
        (option::INFO, wire::info_data(NAME.as_bytes(), &[1, 2, 3])),
        (99, vec![0; 1000]),
        (option::STARTTLS, vec![]),
    ] {
        let mut handshake = siege.handshake();
        let mut answered = 0;
        let fault = loop {
            match handshake.option(kind, &data) {
                Err(fault) if fault.refusal().is_none() => break Some(fault),
                _ if answered == 50_000 => break None,
                _ => answered += 1,
            }
        };
        assert!(fault.is_none_or(|fault| fault.is_closed()), "option {kind} after {answered}");
        assert!(answered >= 100, "so few options may come from a good client: {answered}");
    }
    siege.end(LITTLE);
}

#[test]
fn options_that_are_sent_without_reading_the_answers_end_somehow() {
    let names: Vec<_> = (0..20).map(|index| format!("{index}-{}", "n".repeat(3000))).collect();
    let mut exports: Vec<_> = names.iter().map(|name| Export::new(name, image(8 * MIB)).unwrap()).collect();
    exports.push(Export::new(NAME, image(8 * MIB)).unwrap().writable(true));
    let handshake_time = std::time::Duration::from_millis(500);
    let siege = Siege::serving(exports, Options { handshake_time, ..Options::default() });
    let bytes = wire::option_bytes(option::LIST, b"").repeat(20_000);
    for _ in 0..5 {
        let mut handshake = siege.handshake();
        let stopped = handshake.send_bytes(&bytes);
        assert!(fault_of(stopped).is_closed(), "the server does not wait for ever");
    }
    siege.end(LITTLE);
}

#[test]
fn bytes_behind_starttls_are_not_taken_for_encrypted_ones() {
    let tls = Some(tls::server(false).optional());
    let siege = Siege::with(Options { tls, ..Options::default() });
    for words in [
        wire::option_bytes(option::LIST, b""),
        wire::option_bytes(option::STRUCTURED_REPLY, b""),
        wire::option_bytes(option::GO, &wire::info_data(NAME.as_bytes(), &[])),
        wire::option_bytes(option::STARTTLS, b""),
        vec![0],
        vec![22, 3, 1, 0, 5, 1, 0, 0, 1, 0],
    ] {
        let mut handshake = siege.handshake();
        handshake.send_bytes(&[wire::option_bytes(option::STARTTLS, b""), words.clone()].concat()).unwrap();
        // Somebody in between may have put them there, and lets the client go on with its handshake.
        let heard = handshake.receive_replies(option::STARTTLS);
        let upgraded = heard.and_then(|_| handshake.upgrade(|stream| tls::wrap(stream, None)));
        // The end is right; so is a session that knows nothing of them.
        if let Ok(mut handshake) = upgraded {
            let answer = handshake.send_option(99, b"").and_then(|()| handshake.receive_reply());
            match answer {
                Ok(answer) => assert_eq!(answer.option, 99, "an answer to words that were not encrypted: {words:?}"),
                Err(fault) => assert!(matches!(fault, Fault::Io(_)), "{fault}"),
            }
        }
    }
    siege.end(LITTLE);
}

#[test]
fn options_before_starttls_give_nothing_away_where_it_is_required() {
    let tls = Some(tls::server(false));
    let _turn = Siege::new();
    let server = crate::support::Served::new(
        vec![Export::new(NAME, image(8 * MIB)).unwrap()],
        Options { tls, ..Options::default() },
    );
    let mut handshake = server.handshake();
    for name in [NAME, "other", ""] {
        let refused = fault_of(handshake.info(name, &[]));
        let Some(refusal) = refused.refusal() else { panic!("{refused}") };
        assert_eq!(refusal, reply::ERR_TLS_REQD, "what exists cannot be told from what does not");
    }
    // Everything at once, with GO and requests behind it.
    let mut bytes = wire::option_bytes(option::EXTENDED_HEADERS, b"");
    bytes.extend(wire::option_bytes(option::GO, &wire::info_data(NAME.as_bytes(), &[])));
    bytes.extend(vhdkit_testkit::nbd::Request::read(0, 512).bytes(vhdkit_testkit::nbd::Mode::Extended, 1));
    handshake.send_bytes(&bytes).unwrap();
    for kind in [option::EXTENDED_HEADERS, option::GO] {
        assert_eq!(fault_of(handshake.receive_replies(kind)).refusal(), Some(reply::ERR_TLS_REQD));
    }
    assert_cut_off(&mut handshake);
}

#[test]
fn random_bytes_are_no_handshake() {
    let siege = Siege::new();
    let mut rng = Rng::new(3);
    for round in 0..200 {
        let mut handshake = siege.handshake();
        let mut bytes = rng.bytes(1 + round * 5);
        // Some get further.
        if round % 2 == 0 {
            let kind = rng.below(13) as u32;
            let length = rng.pick(&[0, 4, bytes.len() as u32, bytes.len() as u32 + 1]);
            bytes = wire::option_bytes_saying(kind, length, &bytes);
        }
        handshake.send_bytes(&bytes).unwrap_or(());
        handshake.stream().shutdown(Shutdown::Write).unwrap_or(());
        // Answers, or data of an export, and then the end.
        let mut rest = Vec::new();
        let read = std::io::Read::read_to_end(handshake.stream(), &mut rest);
        assert!(read.is_ok() || rest.len() < 1 << 20, "{read:?}");
    }
    siege.end(LITTLE);
}
