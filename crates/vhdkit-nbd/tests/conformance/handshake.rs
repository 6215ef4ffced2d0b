//! Greeting, options and their answers.

use std::sync::Arc;

use vhdkit::image::BlockDevice;
use vhdkit_nbd::{Export, Options};
use vhdkit_testkit::nbd::wire::{self, client_flag, code, export_flag, greeting_flag, info, option, reply};
use vhdkit_testkit::nbd::{Handshake, Mode, Request};

use crate::support::{MIB, NAME, Served, image, pattern};

const ALLOCATION: &str = "base:allocation";
const DEPTH: &str = "qemu:allocation-depth";

fn export(name: &str, size: u64) -> Export {
    Export::new(name, image(size)).unwrap()
}

/// Two exports: one for reading, which is described, and one for writing.
fn two() -> Served {
    let exports = vec![export("one", 8 * MIB).description("words about it"), export("two", 16 * MIB).writable(true)];
    Served::new(exports, Options::default())
}

#[test]
fn the_greeting_offers_the_fixed_handshake() {
    let (server, _image) = Served::image();
    let handshake = Handshake::greeted(server.stream()).unwrap();
    assert_eq!(handshake.greeting_flags(), greeting_flag::FIXED_NEWSTYLE | greeting_flag::NO_ZEROES);
}

#[test]
fn an_export_is_chosen_by_name_with_and_without_zeros() {
    let server = two();
    for flags in 0..=3 {
        let mut handshake = Handshake::greeted(server.stream()).unwrap();
        handshake.send_client_flags(flags).unwrap();
        if flags & client_flag::FIXED_NEWSTYLE != 0 {
            handshake.structured_reply().unwrap();
        }
        let mode = handshake.mode();
        let mut disk = handshake.export_name("two").unwrap();
        assert_eq!(disk.export().size, 16 * MIB);
        assert_eq!(disk.export().has(export_flag::SEND_DF), mode == Mode::Structured);
        assert_eq!(disk.read(0, 512).unwrap(), [0; 512], "what follows is in step");
        disk.disconnect().unwrap();
    }
}

#[test]
fn a_name_that_does_not_exist_ends_the_session_or_is_refused() {
    let server = two();
    for name in ["three", "", "ONE", "one\0", &"x".repeat(4096)] {
        assert!(server.handshake().export_name(name).unwrap_err().is_closed(), "{name:?}");
        let mut handshake = server.handshake();
        let refused = handshake.info(name, &[]).unwrap_err();
        assert_eq!(refused.refusal(), Some(reply::ERR_UNKNOWN), "{name:?}");
        let refused = handshake.try_go(name, &[]).unwrap_err();
        assert_eq!(refused.refusal(), Some(reply::ERR_UNKNOWN), "{name:?}");
        let mut disk = handshake.go("two", &[]).unwrap();
        assert_eq!(disk.read(0, 512).unwrap(), [0; 512], "a refusal is not the end");
    }
}

#[test]
fn the_empty_name_is_the_only_export() {
    let (server, _image) = Served::image();
    let mut handshake = server.handshake();
    let export = handshake.info("", &[info::NAME]).unwrap();
    assert_eq!((export.size, export.name.as_deref()), (64 * MIB, Some(NAME)));
    let mut disk = handshake.export_name("").unwrap();
    assert_eq!(disk.read(0, 512).unwrap(), [0; 512]);
}

#[test]
fn names_of_4096_bytes_and_of_other_scripts_work() {
    let names = ["n".repeat(4096), "\u{dc}bersicht \u{1f4be}".to_owned()];
    let exports = names.iter().map(|name| export(name, 8 * MIB)).collect();
    let server = Served::new(exports, Options::default());
    let mut handshake = server.handshake();
    let listed: Vec<_> = handshake.list().unwrap().into_iter().map(|(name, _)| name).collect();
    assert_eq!(listed, names);
    for name in &names {
        assert_eq!(handshake.info(name, &[info::NAME]).unwrap().name.as_deref(), Some(name.as_str()));
        assert_eq!(server.handshake().export_name(name).unwrap().export().size, 8 * MIB);
    }
}

#[test]
fn abort_is_acknowledged_and_ends() {
    let (server, _image) = Served::image();
    server.handshake().abort().unwrap();
    let mut handshake = server.handshake();
    handshake.plain_option(option::ABORT, b"data that nobody wants").unwrap();
    vhdkit_testkit::nbd::expect_closed(handshake.stream()).unwrap();
}

#[test]
fn exports_are_listed_with_their_descriptions() {
    let server = two();
    let mut handshake = server.handshake();
    let expected = [("one", "words about it"), ("two", "")].map(|(name, text)| (name.to_owned(), text.to_owned()));
    assert_eq!(handshake.list().unwrap(), expected);
    let refused = handshake.option(option::LIST, b"data").unwrap_err();
    assert_eq!(refused.refusal(), Some(reply::ERR_INVALID));
    assert_eq!(handshake.list().unwrap(), expected, "a refusal is not the end");
}

#[test]
fn tls_is_refused_where_there_is_no_certificate() {
    let (server, _image) = Served::image();
    let mut handshake = server.handshake();
    let refusal = handshake.starttls().unwrap_err().refusal().unwrap();
    assert!([reply::ERR_POLICY, reply::ERR_UNSUP].contains(&refusal), "{refusal:#x}");
    handshake.go(NAME, &[]).unwrap();
}

#[test]
fn info_and_go_tell_the_same() {
    let server = two();
    let requests = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE];
    for (mode, name) in Mode::ALL.into_iter().flat_map(|mode| [(mode, "one"), (mode, "two")]) {
        let mut handshake = server.handshake();
        handshake.agree_on(mode).unwrap();
        let told = handshake.info(name, &requests).unwrap();
        assert_eq!(told.name.as_deref(), Some(name));
        assert_eq!(told.description.as_deref(), (name == "one").then_some("words about it"));
        let [least, preferred, most] = told.block_sizes.unwrap();
        assert_eq!((least, most), (1, 32 << 20));
        assert!((512..=MIB as u32).contains(&preferred), "{preferred}");
        assert_eq!(handshake.try_go(name, &requests).unwrap(), told);
    }
}

#[test]
fn flags_say_what_an_export_can_do() {
    use export_flag as flag;
    let server = two();
    let common = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_CACHE | flag::CAN_MULTI_CONN;
    let writing = flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
    for (name, expected) in [("one", common | flag::READ_ONLY), ("two", common | writing)] {
        let mut handshake = server.handshake();
        assert_eq!(handshake.info(name, &[]).unwrap().flags, expected, "simple replies");
        handshake.structured_reply().unwrap();
        assert_eq!(handshake.info(name, &[]).unwrap().flags, expected | flag::SEND_DF);
        handshake.set_meta_context(name, &[ALLOCATION]).unwrap();
        assert_eq!(handshake.info(name, &[]).unwrap().flags, expected | flag::SEND_DF);
        handshake.extended_headers().unwrap();
        handshake.set_meta_context(name, &[ALLOCATION]).unwrap();
        let all = expected | flag::SEND_DF | flag::BLOCK_STAT_PAYLOAD;
        assert_eq!(handshake.info(name, &[]).unwrap().flags, all);
        handshake.set_meta_context(name, &[]).unwrap();
        assert_eq!(handshake.info(name, &[]).unwrap().flags, expected | flag::SEND_DF, "no contexts, no filter");
    }
}

#[test]
fn an_image_that_is_open_for_reading_is_served_for_reading() {
    let storage = crate::support::memory_image(8 * MIB);
    let device: Arc<dyn BlockDevice> = crate::support::image_in(&storage, false);
    let server = Served::disk(device);
    assert!(server.begin(Mode::Simple).export().has(export_flag::READ_ONLY));
}

#[test]
fn details_that_nobody_knows_are_ignored() {
    let (server, _image) = Served::image();
    let export = server.handshake().info(NAME, &[0x7777, info::BLOCK_SIZE, 0xFFFF]).unwrap();
    assert!(export.block_sizes.is_some() && export.others.is_empty());
    let many: Vec<u16> = (100..2100).collect();
    server.handshake().info(NAME, &many).unwrap();
}

#[test]
fn info_whose_lengths_do_not_fit_is_invalid() {
    let (server, _image) = Served::image();
    let mut handshake = server.handshake();
    for data in [
        b"".as_slice(),
        b"\0\0\0",
        b"\0\0\0\0",
        b"\0\0\0\0\0",
        b"\0\0\0\x05disk\0\0",
        b"\0\0\0\x04disk\0\x01",
        b"\0\0\0\x04disk\0\x01\0",
        b"\0\0\0\x04disk\0\x01\0\x01\0",
        b"\0\0\0\x04disk\0\0\0\x01",
        b"\xff\xff\xff\xffdisk\0\0",
        b"\xff\xff\xff\xfcdisk\0\0",
    ] {
        for option in [option::INFO, option::GO] {
            let refusal = handshake.option(option, data).unwrap_err().refusal();
            assert_eq!(refusal, Some(reply::ERR_INVALID), "{option}: {data:?}");
        }
    }
    handshake.go(NAME, &[]).unwrap();
}

#[test]
fn options_about_headers_have_no_data() {
    let (server, _image) = Served::image();
    let mut handshake = server.handshake();
    for option in [option::STRUCTURED_REPLY, option::EXTENDED_HEADERS] {
        let refused = handshake.plain_option(option, b"\0").unwrap_err();
        assert_eq!(refused.refusal(), Some(reply::ERR_INVALID));
    }
    // They were refused, so nothing was agreed on.
    let mut disk = handshake.go(NAME, &[]).unwrap();
    assert_eq!(disk.mode(), Mode::Simple);
    assert_eq!(disk.read(0, 512).unwrap(), [0; 512]);
}

#[test]
fn extended_headers_stay_whatever_is_asked_for_afterwards() {
    let (server, _image) = Served::image();
    let mut handshake = server.handshake();
    handshake.structured_reply().unwrap();
    handshake.extended_headers().unwrap();
    for option in [option::STRUCTURED_REPLY, option::EXTENDED_HEADERS] {
        let again = handshake.plain_option(option, b"");
        assert!(again.is_ok() || again.unwrap_err().refusal() == Some(reply::ERR_INVALID));
    }
    let mut disk = handshake.go(NAME, &[]).unwrap();
    assert_eq!(disk.read(0, 512).unwrap(), [0; 512]);
}

#[test]
fn extended_headers_do_not_go_with_export_name() {
    let (server, _image) = Served::image();
    let mut handshake = server.handshake();
    handshake.extended_headers().unwrap();
    // The document forbids it to clients; a server that goes on must at least keep to extended headers.
    match handshake.export_name(NAME) {
        Ok(mut disk) => assert_eq!(disk.read(0, 512).unwrap(), [0; 512]),
        Err(fault) => assert!(fault.is_closed(), "{fault}"),
    }
}

#[test]
fn unknown_options_are_unsupported() {
    let (server, _image) = Served::image();
    let mut handshake = server.handshake();
    for option in [0, option::PEEK_EXPORT, 12, 13, 0x1234_5678, u32::MAX] {
        for data in [b"".as_slice(), &[0xA5; 1000], &[0; 16 << 10]] {
            let refused = handshake.plain_option(option, data).unwrap_err();
            assert_eq!(refused.refusal(), Some(reply::ERR_UNSUP), "{option} with {} bytes", data.len());
        }
    }
    handshake.go(NAME, &[]).unwrap();
}

#[test]
fn contexts_are_listed_by_name_and_namespace() {
    let (server, _image) = Served::image();
    let mut handshake = server.handshake();
    handshake.structured_reply().unwrap();
    for (queries, expected) in [
        (vec![], vec![ALLOCATION, DEPTH]),
        (vec!["base:"], vec![ALLOCATION]),
        (vec!["qemu:"], vec![DEPTH]),
        (vec!["qemu:", "base:"], vec![ALLOCATION, DEPTH]),
        (vec![DEPTH, DEPTH], vec![DEPTH]),
        (vec!["base:other", "x-any:thing", "base", "base:allocation2", "BASE:allocation"], vec![]),
        (vec!["qemu:dirty-bitmap:name"], vec![]),
    ] {
        let mut listed = handshake.list_meta_context(NAME, &queries).unwrap();
        listed.sort();
        assert_eq!(listed, expected, "{queries:?}");
    }
    let refused = handshake.list_meta_context("other", &[]).unwrap_err();
    assert_eq!(refused.refusal(), Some(reply::ERR_UNKNOWN));
}

#[test]
fn contexts_are_chosen_by_their_full_names_only() {
    let (server, _image) = Served::image();
    for mode in [Mode::Structured, Mode::Extended] {
        let mut handshake = server.handshake();
        handshake.agree_on(mode).unwrap();
        for (queries, expected) in [
            (vec![ALLOCATION], vec![ALLOCATION]),
            (vec![DEPTH, "x-y:z", ALLOCATION], vec![ALLOCATION, DEPTH]),
            (vec!["base:", "qemu:"], vec![]),
            (vec![], vec![]),
        ] {
            let chosen = handshake.set_meta_context(NAME, &queries).unwrap();
            let mut names: Vec<_> = chosen.into_iter().map(|context| context.name).collect();
            names.sort();
            assert_eq!(names, expected, "{queries:?}");
        }
        let mut disk = handshake.go(NAME, &[]).unwrap();
        assert_eq!(disk.code(Request::block_status(0, 512)).unwrap(), code::EINVAL, "the last choice was none");
    }
}

#[test]
fn contexts_need_structured_replies() {
    let (server, _image) = Served::image();
    let mut handshake = server.handshake();
    let refused = handshake.set_meta_context(NAME, &[ALLOCATION]).unwrap_err();
    assert_eq!(refused.refusal(), Some(reply::ERR_INVALID));
    let mut disk = handshake.go(NAME, &[]).unwrap();
    assert_eq!(disk.code(Request::block_status(0, 512)).unwrap(), code::EINVAL);
}

#[test]
fn a_choice_that_fails_undoes_the_one_before() {
    let (server, _image) = Served::image();
    for data in [b"\0\0\0\x09disk".to_vec(), wire::meta_context_data(b"other", &[b"base:allocation"])] {
        let mut handshake = server.handshake();
        handshake.structured_reply().unwrap();
        handshake.set_meta_context(NAME, &[ALLOCATION]).unwrap();
        handshake.option(option::SET_META_CONTEXT, &data).unwrap_err();
        let mut disk = handshake.go(NAME, &[]).unwrap();
        assert_eq!(disk.code(Request::block_status(0, 512)).unwrap(), code::EINVAL);
    }
}

#[test]
fn contexts_belong_to_the_export_that_they_were_chosen_for() {
    let server = two();
    for (chosen, expected) in [("one", code::EINVAL), ("two", 0)] {
        let mut handshake = server.handshake();
        handshake.extended_headers().unwrap();
        handshake.set_meta_context(chosen, &[ALLOCATION]).unwrap();
        handshake.info("one", &[]).unwrap();
        let mut disk = handshake.go("two", &[]).unwrap();
        assert_eq!(disk.code(Request::block_status(0, 512)).unwrap(), expected);
        assert_eq!(disk.export().has(export_flag::BLOCK_STAT_PAYLOAD), expected == 0);
    }
}

#[test]
fn queries_whose_lengths_do_not_fit_are_invalid() {
    let (server, _image) = Served::image();
    let mut handshake = server.handshake();
    handshake.structured_reply().unwrap();
    for data in [
        b"".as_slice(),
        b"\0\0\0\x04disk",
        b"\0\0\0\x04disk\0\0\0\x01",
        b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x05base",
        b"\0\0\0\x04disk\0\0\0\x02\0\0\0\x05base:",
        b"\0\0\0\x04disk\0\0\0\0extra",
        b"\0\0\0\x04disk\xff\xff\xff\xff",
        b"\0\0\0\x04disk\xff\xff\xff\xff\0\0\0\0",
        b"\xff\xff\xff\xffdisk\0\0\0\0",
    ] {
        for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
            let refusal = handshake.option(option, data).unwrap_err().refusal();
            assert_eq!(refusal, Some(reply::ERR_INVALID), "{option}: {data:?}");
        }
    }
    assert_eq!(handshake.list_meta_context(NAME, &["base:"]).unwrap(), [ALLOCATION]);
}

#[test]
fn requests_right_behind_the_handshake_are_served() {
    let (server, image) = Served::image();
    image.write_at(&pattern(1, 4096), 0).unwrap();
    // Options, GO and the first request in one piece, as if the client knew all the answers.
    let mut handshake = server.handshake();
    let mut bytes = wire::option_bytes(option::EXTENDED_HEADERS, b"");
    bytes.extend(wire::option_bytes(option::GO, &wire::info_data(NAME.as_bytes(), &[])));
    let request = Request::read(0, 4096);
    bytes.extend(request.bytes(Mode::Extended, 1));
    bytes.extend(request.bytes(Mode::Extended, 2));
    handshake.send_bytes(&bytes).unwrap();
    handshake.receive_replies(option::EXTENDED_HEADERS).unwrap();
    assert_eq!(handshake.receive_replies(option::GO).unwrap().len(), 1);
    let mut disk = handshake.into_transmission(vhdkit_testkit::nbd::ExportInfo::default());
    for cookie in [1, 2] {
        let message = disk.receive_message().unwrap();
        assert_eq!((message.cookie, message.is_done(), message.mode), (cookie, true, Mode::Extended));
    }
}
