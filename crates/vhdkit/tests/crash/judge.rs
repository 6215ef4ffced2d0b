//! The judge of crash images: all that the simulator judges, and what only this format knows.

use std::sync::{Arc, Mutex};

use vhdkit::format::finding::Code;
use vhdkit::format::guid::Guid;
use vhdkit::format::header::{HEADER_BYTES, Header, OFFSETS};
use vhdkit::image::OpenOptions;
use vhdkit::storage::Storage;
use vhdkit_testkit::sim::{
    Case, CrashImage, ImageJudge, Judge, PageMap, SectorHistory, SimStorage, frozen_parents, verify_image, verify_view,
};

use super::{Style, lock, options};
use crate::bases::Base;
use crate::truth::entries_tell_the_truth;

/// What the disk was when its session began.
pub(super) struct SessionStart {
    data_write_guid: Guid,
    file_write_guid: Guid,
    history: SectorHistory,
    /// The file without its headers, by its hash; nothing when some of it was not durable yet, as holes may be that the
    /// session before made.
    file: Option<u64>,
}

impl SessionStart {
    pub(super) fn new(header: &Header, history: SectorHistory, storage: &SimStorage) -> Self {
        let Header { data_write_guid, file_write_guid, .. } = *header;
        let file = (storage.pending() == 0).then(|| without_headers(storage.pages()));
        Self { data_write_guid, file_write_guid, history, file }
    }

    /// While an identity is the old one, so is what it stands for.
    fn judge(&self, header: &Header, image: &CrashImage, inner: &ImageJudge) -> Result<(), String> {
        if header.data_write_guid == self.data_write_guid {
            // Else a child would take a changed parent for its own.
            let old = verify_view(&image.storage(), &self.history, inner);
            old.map_err(|error| format!("the data write GUID is that of the session's start: {error}"))?;
        }
        if header.file_write_guid == self.file_write_guid
            && self.file.is_some_and(|file| without_headers(image.pages().clone()) != file)
        {
            return Err("the file write GUID is that of the session's start, and the file is not".to_owned());
        }
        Ok(())
    }
}

fn without_headers(mut pages: PageMap) -> u64 {
    OFFSETS.iter().for_each(|&offset| pages.zero(offset..offset + HEADER_BYTES as u64));
    pages.content_hash()
}

/// Judges crash images: all that the simulator judges, and what only this format knows.
pub(crate) struct CrashJudge {
    pub(super) inner: ImageJudge,
    pub(super) start: Mutex<Option<SessionStart>>,
    witness: Option<Arc<dyn Judge>>,
}

impl Judge for CrashJudge {
    fn judge(&self, image: &CrashImage, history: &SectorHistory, case: &mut Case) -> Result<(), String> {
        verify_image(image, history, &self.inner, case)?;
        let header = current_header(&*image.storage())?;
        if entries_tell_the_truth(&image.storage(), &header, self.inner.parents.as_ref())? {
            case.tally("images whose newest log entry goes on at the start of the ring");
        }
        if let Some(start) = lock(&self.start).as_ref() {
            start.judge(&header, image, &self.inner)?;
        }
        self.witness.as_ref().map_or(Ok(()), |witness| witness.judge(image, history, case))
    }
}

impl CrashJudge {
    /// A file whose session has ended: either header alone says that the log is clean (V-172), and stands for the same
    /// disk, also to who writes and has not allowed any replay.
    pub(super) fn judge_closed(&self, pages: &PageMap, history: &SectorHistory) -> Result<(), String> {
        let mut tolerated = self.inner.tolerated.clone();
        tolerated.push(Code::HeaderCopyDamaged);
        let tolerant = ImageJudge { tolerated, replay: None, ..self.inner.clone() };
        for offset in OFFSETS {
            let mut pages = pages.clone();
            pages.zero(offset..offset + HEADER_BYTES as u64);
            let image = CrashImage::new(pages);
            let told = |error: String| format!("closed, then the header at {offset:#x} damaged: {error}");
            verify_view(&image.storage(), history, &tolerant).map_err(told)?;
            let options = OpenOptions::new().write(true);
            let options = match &self.inner.parents {
                Some(parents) => options.parents(Arc::clone(parents)),
                None => options,
            };
            options.open(Arc::new(image.writable()), None).map_err(|error| told(error.to_string()))?;
        }
        Ok(())
    }
}

/// Both header copies, where they are valid.
pub(crate) fn headers(storage: &dyn Storage) -> [Option<Header>; 2] {
    OFFSETS.map(|offset| {
        let mut bytes = [0; HEADER_BYTES];
        storage.read_at(&mut bytes, offset).ok()?;
        Header::decode(&bytes)
    })
}

pub(crate) fn current_header(storage: &dyn Storage) -> Result<Header, String> {
    let newest = headers(storage).into_iter().flatten().max_by_key(|header| header.sequence_number);
    newest.ok_or_else(|| "no valid header".to_owned())
}

pub(super) fn judge_of(base: &Base, style: &Style) -> Arc<CrashJudge> {
    let parents = std::iter::successors(base.image.parent.as_deref(), |parent| parent.parent.as_deref());
    let parents: Vec<CrashImage> = parents.map(|parent| CrashImage::new(PageMap::from(&parent.file))).collect();
    let parents = Some(frozen_parents(parents));
    let (broken, chain) = (style.broken, parents.clone());
    let inner = ImageJudge {
        parents,
        tolerated: base.tolerated.clone(),
        replay: Some(Arc::new(move |storage: Arc<dyn Storage>| {
            let image = options(broken, chain.as_ref()).open(storage, None)?;
            image.replay()?;
            image.close()
        })),
        replay_percent: style.replay_percent,
        damage_percent: style.damage_percent,
        second_cuts: style.second_cuts,
    };
    Arc::new(CrashJudge { inner, start: Mutex::new(None), witness: base.witness.clone() })
}
